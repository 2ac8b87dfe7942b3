"""FlexAttention with tables built outside the graph and everything that differs between plans in tensors.

References
----------
``torch.nn.attention.flex_attention``: on the CPU it compiles the forward for inference, without gradients or LSE, and
wants index lists as wide as the mask; on CUDA lists are as wide as the fullest row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from attnplan.errors import SpecError
from attnplan.patterns import Pattern, Shape
from attnplan.patterns.tiles import Grid, block_table
from attnplan.runtime.compiling import PerShape, layout
from attnplan.runtime.conditions import Condition, condition
from attnplan.runtime.device_tables import DeviceTable
from attnplan.runtime.masks import runtime_tables
from attnplan.runtime.scores import biased, pointwise, position, spread
from attnplan.runtime.tables import Lists, block_lists

_KEPT_STRUCTURES = 256
Tables = tuple[Tensor, ...]
"""Counts and indices of partial and of full tiles."""


@attrs.frozen
class Options:
    """What is the same for all plans of one structure, beside the condition."""

    lengths: tuple[int, int]
    tile: tuple[int, int]
    scale: float
    softcap: float | None
    grouped: bool
    biases: tuple[str, ...] = ()
    """Operands that are added to scores."""
    kernel: str = ""
    """``"FLASH"`` for flash-attn 4 instead of Triton."""


class Structure:
    """All plans whose FlexAttention differs in tensors only."""

    def __init__(self, module: torch.fx.GraphModule, options: Options) -> None:
        self.module, self.options = module, options
        self.compiled = PerShape(run, "FlexAttention")


_structures: OrderedDict[tuple[int, Options], Structure] = OrderedDict()


def structure(module: torch.fx.GraphModule, options: Options) -> Structure:
    """Return the structure of a condition and options, the same object for equal ones."""
    key = (id(module), options)  # the structure keeps its module, so the number is not given to another
    if len(_structures) >= _KEPT_STRUCTURES:
        _structures.popitem(last=False)
    return _structures.setdefault(key, Structure(module, options))


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    captures: Sequence[Tensor],
    biases: Sequence[Tensor],
    like: Structure,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Call FlexAttention; what a trace takes up.

    Parameters
    ----------
    q, k, v
        ``[B, H, S, D]``, ``[B, H_kv, K, D]``, ``[B, H_kv, K, Dv]``.
    rows, columns
        Counts and indices of partial and of full tiles, by tile rows and, for the backward, by tile columns.
    captures
        What the condition takes behind its positions.
    biases
        Tensors of :func:`~attnplan.runtime.scores.biased`.
    """
    module, options = like.module, like.options

    def mask(b: Tensor, h: Tensor, q_row: Tensor, k_row: Tensor) -> Tensor:
        found: Tensor = module.forward(b, h, q_row, k_row, *captures)
        return found

    def changed(score: Tensor, b: Tensor, h: Tensor, q_row: Tensor, k_row: Tensor) -> Tensor:
        if options.softcap is not None:
            score = options.softcap * torch.tanh(score / options.softcap)
        return biased(score, options.biases, biases, b, h, q_row, k_row)

    lists: Any = (*rows, *(columns if len(columns) else (None,) * 4), options.tile, mask)
    blocks = BlockMask(options.lengths, *lists)
    asked: Any = AuxRequest(lse=True) if return_lse else None
    result: Any = flex_attention(
        q,
        k,
        v,
        score_mod=None if options.softcap is None and not options.biases else changed,
        block_mask=blocks,
        scale=options.scale,
        enable_gqa=options.grouped,
        return_aux=asked,
        kernel_options=_kernel_options(q, k, options),
    )
    if return_lse:
        return result[0], result[1].lse
    return result, None


def _kernel_options(q: Tensor, k: Tensor, options: Options) -> Any:
    """Return what FlexAttention is told about its kernel; the two options exclude one another."""
    if options.kernel:
        return {"BACKEND": options.kernel}
    return {"FORCE_USE_FLEX_ATTENTION": True} if _outgrows_decoding(q, k, options) else None


def _outgrows_decoding(q: Tensor, k: Tensor, options: Options) -> bool:
    """Return whether Inductor would choose its kernel for few queries, and then find that they fill no tile of it.

    That kernel puts the queries of a whole group of heads into one tile, which has to divide those of the mask.
    """
    length = options.lengths[0]
    return q.is_cuda and length < 128 and length * (q.shape[1] // k.shape[1]) > options.tile[0]


class FlexAttend:
    """One attend over whole inputs by FlexAttention.

    Parameters
    ----------
    where, shape, shift
        The condition, the sizes of the call, and the position of query row 0, None if it arrives with the call.
    options
        The rest.
    device
        Device of the tables.
    """

    def __init__(self, where: Pattern, shape: Shape, shift: int | None, options: Options, device: str) -> None:
        self.shape, self.shift, self.device = shape, shift, torch.device(device)
        self.narrow = self.device.type != "cpu"
        self.condition: Condition = condition(where, shape, shift).to(self.device)
        self.like = structure(self.condition.module, options)
        self.table: DeviceTable | None = None
        self.tabulate = PerShape(arriving_tables, "block tables")
        self.rows: Tables = ()
        self.columns: Tables = ()
        self.static: list[Tensor] = []
        if where.operands or shift is None:
            self.table = DeviceTable(where, shape, options.tile, q_offset=shift is None).to(self.device)
            return
        grid = Grid(shift or 0, shape.seq_len, 0, shape.kv_len, options.tile)
        lists = block_lists(block_table(where, shape, options.tile, grid=grid), self.device)
        self.rows = _sized(_plain(lists.rows), grid.columns, self.narrow)
        self.columns = _sized(_plain(lists.columns), grid.rows, self.narrow) if self.narrow else ()
        self.static = self.condition.captures({}, 1, shape.kv_len, self.device)

    def tables(self, operands: Mapping[str, Any], batch: int) -> tuple[Tables, Tables, list[Tensor]]:
        """Return the index lists by rows, by columns where there is a backward, and captures, for one call's operands.

        On a GPU what makes them is compiled, too: it is many small steps, which would take as long as some attention.
        Sizes that differ between calls, as the number of documents, are gone before that.
        """
        if self.table is None:
            return self.rows, self.columns, self.static
        with torch.no_grad():
            found = runtime_tables(operands, self.shape.kv_len)
            first = position(operands["q_offset"], self.device).reshape(-1) if self.shift is None else None
            names, values = tuple(found), tuple(found.values())
            key = None if first is None else layout(first), *map(layout, values)
            make = (values, names, first, self.table, self.narrow)
            rows, columns = self.tabulate(key, *make) if self.narrow else arriving_tables(*make)
            captures = self.condition.arriving(found, first, batch)
        return rows, columns, [*self.condition.constants, *captures]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, LSE if asked for), compiled for the structure that this attend shares."""
        check_precision(q)
        rows, columns, captures = self.tables(operands, q.shape[0])
        biases = self._biases(operands, q)
        shapes = (x.shape for x in (*rows, *columns, *captures, *biases))
        key = (return_lse, len(columns), *shapes, *(x.requires_grad for x in biases))
        found: tuple[Tensor, Tensor | None] = self.like.compiled(
            key, q, k, v, rows, columns, captures, biases, self.like, return_lse
        )
        return found

    def _biases(self, operands: Mapping[str, Any], q: Tensor) -> tuple[Tensor, ...]:
        names = self.like.options.biases
        made = pointwise(names, operands, self.shift, q)
        return spread(names, made, q.shape[2]) if self.narrow else made

    def traced(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return :func:`run` for a plan whose tables are static, as a traced program takes it up."""
        biases = self._biases(operands, q)
        return run(q, k, v, self.rows, self.columns, self.static, biases, self.like, return_lse)


def check_precision(q: Tensor) -> None:
    """Raise :class:`~attnplan.errors.SpecError` if a global flag lets float32 products on CUDA use TF32."""
    if q.is_cuda and q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        raise SpecError(
            "this process lets float32 products use TF32, the spec says precision='ieee', and a plan changes no "
            "global flag: call torch.set_float32_matmul_precision('highest')"
        )


def arriving_tables(
    values: Sequence[Tensor], names: Sequence[str], first_row: Tensor | None, table: DeviceTable, narrow: bool
) -> tuple[Tables, Tables]:
    """Return the index lists by rows and by columns for the named tables of one call: nothing is read back."""
    found, grid = table.judged(dict(zip(names, values, strict=True)), first_row), table.grid
    columns = _sized(found.by_columns(grid.columns), grid.rows, narrow) if narrow else ()
    return _sized(found, grid.columns, narrow), columns


def _sized(found: Tables, most: int, narrow: bool) -> Tables:
    """Return counts and indices whose width is one of few, so that plans of like width share a graph."""
    partial_count, partial, full_count, full = found
    width = max(partial.shape[-1], full.shape[-1])
    wide = min(most, 1 << (width - 1).bit_length()) if narrow else most
    pad = torch.nn.functional.pad
    partial, full = (pad(x, (0, wide - x.shape[-1]))[..., :wide] for x in (partial, full))
    return partial_count, partial, full_count, full


def _plain(lists: Lists) -> Tables:
    return lists.partial_count, lists.partial_index, lists.full_count, lists.full_index
