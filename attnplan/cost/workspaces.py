"""What attention kernels allocate while they run, beside their results."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod

import attrs

from attnplan.cost.buffers import flash_cpu
from attnplan.cost.setting import Setting
from attnplan.cost.tiles import DOCUMENTS
from attnplan.ir import Attend, Node
from attnplan.ir.native import lowered
from attnplan.ir.slots import slot_condition

MULTIPROCESSORS = 132


@attrs.frozen
class Needs:
    """What the kernels of a library allocate on CUDA beside what they return."""

    in_order: bool = True
    """Whether the backward copies the gradient of the output, and the output, unless they lie as ``[B, S, H, D]``."""
    rows_first: bool = False
    """Whether results lie as ``[B, S, H, D]`` whatever the order of q, instead of as q does."""
    sums: bool = True
    """Whether the backward sums dq in float32, in memory."""
    features: tuple[int, int] = (128, 32)
    """(most, step): up to so many features these sums are padded to multiples of a step, beyond to those of its
    double."""
    wide: bool = False
    """Whether heads beyond 128 features have their sums in memory: those of the output, of dk and of dv, too."""
    splits: str = "flash"
    """Who cuts keys into pieces, each with a partial output: ``"flash"`` where it has few blocks of rows, ``"all"`` by
    xformers' rule, ``"documents"`` by :mod:`attnplan.runtime.split_keys`, ``"few"`` for less than a tile of rows;
    ``"some"`` as many as fill a device."""
    shows_keys: bool = False
    """Whether heads that share keys become batches: results of either side are brought back by a copy."""
    sums_keys: bool = False
    """Whether gradients of shared keys are summed over heads in float32, instead of one in their dtype for each."""
    blanks: bool = False
    """Whether it leaves rows without a key to its caller under a mask, who copies the output and blanks them."""
    marks_empty: bool = False
    """Whether every LSE is read through for rows without a key, whatever was asked for."""
    alike: bool = False
    """Whether the backward copies q and the gradient of the output where these have gaps and the output has none."""

    def of(self, *, training: bool, masked: bool = True, shared: bool = True, wide: bool = True) -> Needs:
        """Return what of this matters: not what only a backward allocates, or masks, shared keys or wide heads."""
        found = self
        if not training:
            found = attrs.evolve(found, in_order=True, sums=True, features=(128, 32), sums_keys=False, alike=False)
        return attrs.evolve(
            found,
            blanks=found.blanks and masked,
            shows_keys=found.shows_keys and shared,
            sums_keys=found.sums_keys and shared,
            wide=found.wide and wide,
        )


NEEDS: Mapping[str, Needs] = {
    "cudnn": Needs(in_order=False, splits="", alike=True),
    "flash-cuda": Needs(),
    "efficient": Needs(rows_first=True, features=(64, 64), wide=True, splits="", shows_keys=True, blanks=True),
    "fa2": Needs(in_order=False),
    "fa3": Needs(in_order=False, features=(64, 64), splits=""),
    "fa4": Needs(in_order=False, rows_first=True, features=(64, 64), splits="documents", sums_keys=True),
    "xformers-flash": Needs(shows_keys=True),
    "xformers-cutlass": Needs(rows_first=True, features=(64, 64), wide=True, splits="", shows_keys=True, blanks=True),
    "xformers-split-k": Needs(rows_first=True, splits="all", shows_keys=True),
    "flex": Needs(in_order=False, sums=False, splits="few", marks_empty=True),
    "flex-flash": Needs(in_order=False, features=(64, 64), splits="few", marks_empty=True),
}
"""By :attr:`~attnplan.cost.setting.KernelModel.key`, as measured on an H100 (``bench/results/regret-h100-*.json``)."""
ANY = Needs(rows_first=True, features=(64, 64), splits="some", marks_empty=True)
"""What a kernel is taken to need that nobody has written down."""


@lru_cache(maxsize=512)
def like(key: str, *, training: bool = True, masked: bool = True, shared: bool = True, wide: bool = True) -> str:
    """Return the first kernel that allocates as another does, by their keys; nothing if nobody wrote it down.

    Examples
    --------
    >>> like("fa2"), like("cudnn"), like("mine")
    ('fa2', 'cudnn', '')

    Without a backward more of them are alike, or where no heads share keys:

    >>> like("fa2", training=False), like("fa3", training=False), like("xformers-flash", shared=False)
    ('flash-cuda', 'cudnn', 'flash-cuda')
    """
    if key not in NEEDS:
        return ""
    told = {"training": training, "masked": masked, "shared": shared, "wide": wide}
    wanted = NEEDS[key].of(**told)
    return next(other for other, found in NEEDS.items() if found.of(**told) == wanted)


def needs(setting: Setting) -> Needs:
    """Return what the kernel of a setting needs."""
    return NEEDS.get(setting.kernel.key, ANY)


def forward_workspace(node: Node, setting: Setting, kind: str, blocks: int | None = None) -> int:
    """Return the bytes that a fused kernel allocates in the forward.

    ``blocks`` are the heads of all batch elements, and of all parts of a launch; by default those of the node alone.
    """
    q, k = (setting.graph[a].type for a in node.args[:2])
    blocks = prod(q.rows.sizes[:-1]) * setting.batch if blocks is None else blocks
    if kind == "cpu":
        return flash_cpu(q.rows.length, k.rows.length, q.features, setting.item, setting.accumulator)
    of, rows, features = needs(setting), blocks * q.rows.length, node.type.features
    found = 2**18 + blocks * (-q.rows.length % 32) * 4
    if of.marks_empty or _may_lack_keys(node, setting):
        found += 5 * rows + 4 * rows * _has_documents(node, setting)  # a condition and a copy; documents lie end to end
    wide = rows * features * 4 if of.wide and features > 128 else 0
    split = _split_rows(node, setting, of, blocks) if of.splits else 0
    back = _back(node, setting, of) if of.shows_keys or of.blanks else 0
    return found + max(wide, split, back)


def _split_rows(node: Node, setting: Setting, of: Needs, blocks: int) -> int:
    """Return the bytes of the partial outputs of a kernel that splits keys."""
    q, k = (setting.graph[a].type.rows for a in node.args[:2])
    assert isinstance(node.op, Attend)
    rows, features = q.length, node.type.features
    if of.splits == "all":
        pieces = split_keys(blocks, rows, k.length)
        whole = blocks * rows * features * setting.item
        return (pieces * blocks * -(-rows // 32) * 32 * (features + 2) * 4 + whole) * (pieces > 1)
    if of.splits == "flash":
        if rows == 1 and _shared(setting, node):  # the heads that share keys become rows
            rows = q.elements_count * setting.batch // (k.elements_count // k.length * setting.batch)
            blocks //= rows
        pieces = flash_splits(blocks, rows, k.length, features)
        if pieces == 1 or _has_documents(node, setting):
            return 0
        return pieces * blocks * rows * (-(-features // 32) * 32 + 1) * 4
    if of.splits == "documents" and setting.batch == 1 and slot_condition(node.op, q, k) == "full":
        pieces = min(MULTIPROCESSORS // max(1, blocks * -(-rows // 128)), k.length // 1024)
        return pieces * blocks * rows * (features * (2 * setting.item + 4) + 8) * (pieces > 1)
    if of.splits == "some":
        return min(-(-k.length // 64) * blocks * rows, MULTIPROCESSORS * 128) * (features + 1) * 4
    if of.splits == "few" and rows < 128:
        group = q.elements_count * k.length // (k.elements_count * rows) if k.elements_count else 1
        return 2 * MULTIPROCESSORS * max(16, group * rows) * (features + 2) * 4
    return 0


def _back(node: Node, setting: Setting, of: Needs) -> int:
    """Return the bytes of an output that is copied: to the heads of q where they share keys, or to blank some rows."""
    q = setting.graph[node.args[0]].type.rows
    shared = of.shows_keys and of.rows_first and _shared(setting, node) and q.length > 1
    blanked = of.blanks and _is_masked(node, setting)
    rows = q.elements_count * setting.batch
    return rows * (node.type.features * setting.item + blanked * 5) if shared or blanked else 0


def _shared(setting: Setting, node: Node) -> bool:
    q, k = (setting.graph[a].type.rows for a in node.args[:2])
    return k.elements_count * q.length < q.elements_count * k.length


def _is_masked(node: Node, setting: Setting) -> bool:
    q, k = (setting.graph[a].type.rows for a in node.args[:2])
    assert isinstance(node.op, Attend)
    masked = slot_condition(node.op, q, k) == "mask"
    return masked and lowered(setting.graph, node, setting.kernel.native) is None


def _may_lack_keys(node: Node, setting: Setting) -> bool:
    q, k = (setting.graph[a].type.rows for a in node.args[:2])
    assert isinstance(node.op, Attend)
    return slot_condition(node.op, q, k) == "mask"


def _has_documents(node: Node, setting: Setting) -> bool:
    found = lowered(setting.graph, node, setting.kernel.native) if _may_lack_keys(node, setting) else None
    return found is not None and found.documents


def split_keys(blocks: int, rows: int, keys: int) -> int:
    """Return into how many pieces xformers' split-k cuts the keys of as many heads of a batch: its own rule.

    Examples
    --------
    >>> split_keys(16, 16_384, 16_384), split_keys(8, 1024, 1024), split_keys(128, 512, 512), split_keys(512, 1, 8192)
    (64, 8, 1, 16)
    """
    if rows > 1 and blocks > 64:
        return 1
    pieces, least = max(keys, 1024) // max(1, blocks), 64 if keys <= 512 and blocks <= 64 else 128
    while pieces > keys / least:
        pieces //= 2
    return max(1, min(pieces, 64))


@lru_cache(maxsize=1024)
def flash_splits(blocks: int, rows: int, keys: int, features: int) -> int:
    """Return into how many pieces FlashAttention-2 cuts the keys of as many heads of a batch: its own rule.

    Examples
    --------
    >>> flash_splits(12, 1024, 1024, 64), flash_splits(48, 1024, 1024, 64)
    (4, 1)
    """
    units, few = 2 * MULTIPROCESSORS, blocks * -(-rows // 64)
    if few >= 0.8 * units:
        return 1
    tiles = -(-keys // (256 if features <= 64 else 128 if features <= 128 else 64))
    some = [n for n in range(1, min(128, units, tiles) + 1) if n == 1 or -(-tiles // n) != -(-tiles // (n - 1))]
    full = [few * n / units / -(-few * n // units) for n in some]
    return next(n for n, share in zip(some, full, strict=True) if share >= 0.85 * max(full))


def backward_workspace(node: Node, setting: Setting, kind: str) -> int:
    """Return the bytes that a fused kernel allocates in the backward."""
    q, k, _ = (setting.graph[a].type for a in node.args)
    blocks = prod(q.rows.sizes[:-1]) * setting.batch
    shared = _shared(setting, node)
    both = k.features + node.type.features
    if kind == "cpu":
        repeated = blocks * k.rows.length * both * setting.item
        buffers = 3 * flash_cpu(q.rows.length, k.rows.length, q.features, setting.item, setting.accumulator)
        return buffers + blocks * q.rows.length * q.features * setting.item + shared * repeated
    of = needs(setting)
    padding = DOCUMENTS * 128 * blocks if _has_documents(node, setting) else 0
    rows = blocks * -(-q.rows.length // 128) * 128 + padding
    most, step = of.features
    step = step if q.features <= most else 2 * step
    found = 2**20 + rows * 8 + rows * -(-q.features // step) * step * 4 * of.sums
    if _may_lack_keys(node, setting) or of.marks_empty:
        found += 5 * rows
    if shared and of.sums_keys:
        own = k.rows.elements_count // k.rows.length * setting.batch
        found += own * -(-k.rows.length // 128) * 128 * both * 4
    elif shared and of.sums:
        found += blocks * k.rows.length * both * setting.item
    if of.wide and q.features > 128:  # sums of a block of 128 keys, for as many blocks of threads as fit the device
        found += (MULTIPROCESSORS + blocks) * 128 * both * 4
    return found


def block_bytes(node: Node, setting: Setting, *, backward: bool) -> int:
    """Return the bytes of one step of an attend that computes its scores block by block."""
    op = node.op
    assert isinstance(op, Attend)
    assert op.loop is not None
    q, k, v = (setting.graph[a].type for a in node.args)
    acc = setting.accumulator
    heads = prod(q.rows.sizes[:-1]) * setting.batch
    rows, keys = min(op.loop[0], q.rows.length), min(op.loop[1], k.rows.length)
    shared = k.rows.elements_count * q.rows.length < q.rows.elements_count * k.rows.length
    copies = (acc != setting.item) + shared + backward  # of k or v: cast, shown to each head, a gradient
    scores = 3 + 2 * (op.softcap is not None) if backward else 1
    tall = rows * (2 * q.features + v.features + 16 if backward else q.features + 2 * v.features + 8)
    wide = copies * keys * max(k.features, v.features)
    return heads * (scores * rows * keys + tall + wide) * acc + 2 * rows * keys
