"""The page that people read before they trust a plan, and the same facts as a dict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attnplan.cost.tiles import attend_tiles
from attnplan.draw import TILES, mask_rows
from attnplan.errors import SpecError
from attnplan.ir import Attend, Graph, Merge, Mix, Node, RowMap, Take
from attnplan.ir.slots import slot_condition
from attnplan.search import Candidate
from attnplan.spec import AttentionSpec, Dim
from attnplan.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from attnplan.plan import Plan

SCHEMA = 1
"""Version of the dict that :func:`facts` returns."""


def facts(plan: Plan) -> dict[str, Any]:
    """Return everything that an explain page says, as plain data.

    Keys: ``schema``, ``spec``, ``device``, ``choice``, ``does``, ``mask``, ``passes``, ``ops``, ``others``.
    """
    chosen = next(c for c in plan.candidates if c.prediction is plan.predicted)
    return {
        "schema": SCHEMA,
        "spec": _spec_facts(plan.spec),
        "device": {
            "name": plan.device.name,
            "title": plan.device.title,
            "here": plan.target.torch_device is not None,
            "note": plan.target.note,
            "source": plan.device.source,
        },
        "choice": {
            **_candidate_facts(chosen),
            "versions": plan._backend.versions(),
            "note": getattr(plan._backend, "note", ""),
            "basis": "data sheet",
            "inputs_and_output_bytes": _io_bytes(plan.spec),
            "work": "forward and backward" if plan.spec.training else "forward",
        },
        "does": _share(plan.spec),
        "mask": mask_rows(plan.spec),
        "passes": [{"name": s.name, "before": s.before, "after": s.after, "seconds": s.seconds} for s in plan.steps],
        "ops": [_op_facts(plan, node) for node in plan.graph if isinstance(node.op, Attend | Merge | Mix | Take)],
        "others": [_candidate_facts(c) for c in plan.candidates if c is not chosen],
    }


def _spec_facts(spec: AttentionSpec) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = spec.to_dict()
    except SpecError:  # a mask function has no text form
        plain = {"pattern": repr(spec.pattern), "seq_len": spec.shape.seq_len, "heads": spec.heads}
    return {**plain, "title": title(spec), "shape": _shape_line(spec)}


def title(spec: AttentionSpec) -> str:
    """Return the pattern in one line of words."""
    causal = ", causal" if spec.causal else ""
    return f"{spec.pattern!r}{causal}"


def _shape_line(spec: AttentionSpec) -> str:
    def size(n: int | Dim) -> str:
        return f"{n.name}<={n.max}" if isinstance(n, Dim) else str(n)

    kv = "" if spec.kv_len == spec.seq_len else f" K={size(spec.kv_len)}"
    kv += "" if spec.kv_heads == spec.heads else f" H_kv={spec.kv_heads}"
    value = "" if spec.value_dim == spec.head_dim else f" Dv={spec.value_dim}"
    return f"{spec.dtype} [B={spec.batch} H={spec.heads} S={size(spec.seq_len)} D={spec.head_dim}{value}]{kv}"


def _candidate_facts(candidate: Candidate) -> dict[str, Any]:
    prediction = candidate.prediction
    return {
        "name": candidate.name,
        "strategy": candidate.strategy,
        "backend": candidate.backend,
        "schedule": candidate.schedule,
        "seconds": None if prediction is None else prediction.seconds,
        "peak_bytes": None if prediction is None else prediction.peak_bytes,
        "refused": list(candidate.reasons),
    }


def _io_bytes(spec: AttentionSpec) -> int:
    from attnplan.cost.rules import ITEM_BYTES

    shape = spec.shape
    queries = spec.heads * shape.seq_len * (spec.head_dim + spec.value_dim)
    keys = spec.kv_heads * shape.kv_len * (spec.head_dim + spec.value_dim)
    return spec.batch * (queries + keys) * ITEM_BYTES[spec.dtype]


def _share(spec: AttentionSpec) -> dict[str, Any]:
    """Return how many pairs the spec has beside dense attention of the same shape."""
    shape = spec.shape
    dense = spec.batch * spec.heads * shape.seq_len * shape.kv_len
    if spec.causal and shape.seq_len == shape.kv_len:
        dense = spec.batch * spec.heads * shape.seq_len * (shape.seq_len + 1) // 2
    kind = "causal " if spec.causal and shape.seq_len == shape.kv_len else ""
    try:
        pairs: int | None = spec.count_pairs()
    except SpecError:
        pairs = None
    return {"pairs": pairs, "dense_pairs": dense, "dense": f"dense {kind}pairs", "branches": len(spec.branches)}


def _op_facts(plan: Plan, node: Node) -> dict[str, Any]:
    op = plan.predicted.ops[node.id]
    return {
        "id": node.id,
        "op": node.op.name,
        "what": _what(plan.graph, node, plan.spec, copied=op.cost.bytes > 0),
        "result": str(node.type),
        "gflop": op.cost.flops / 1e9,
        "exps": op.cost.exps,
        "bytes": op.cost.bytes + op.cost.copied,
        "seconds": op.seconds,
        "bound": op.bound,
        "roofline": op.roofline,
    }


def _tiles(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec) -> str:
    assert op.tile is not None
    kept = attend_tiles(op, q, k, spec)
    total = q.elements_count // q.length * -(-q.length // op.tile[0]) * -(-k.length // op.tile[1])
    boxes = "" if op.boxes is None else f" by boxes {op.boxes[0]}, {op.boxes[1]}"
    return f"{kept} of {total} tiles {op.tile[0]}x{op.tile[1]}{boxes}"


def _what(graph: Graph, node: Node, spec: AttentionSpec, *, copied: bool) -> str:
    op = node.op
    if isinstance(op, Attend):
        q, k = (graph[a].type.rows for a in node.args[:2])
        condition = slot_condition(op, q, k) if op.tile is None else _tiles(op, q, k, spec)
        blocks = node.type.rows.elements_count // q.length
        square = f"{q.length}^2" if q.length == k.length else f"{q.length}x{k.length}"
        return f"{condition}, {blocks} x {square}"
    if isinstance(op, Take):
        return f"{graph.args(node)[0].type.tensor}, {'copy' if copied else 'view'}"
    rule = f"{op.rule}, " if isinstance(op, Mix) else ""
    return f"{rule}{len(node.args)} parts"


def render(found: dict[str, Any]) -> str:
    """Return the page as text, 100 columns wide where names allow."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    spec, choice, device = found["spec"], found["choice"], found["device"]
    yield spec["title"]
    yield f"           {spec['shape']}"
    versions = ", ".join(f"{name} {version}" for name, version in choice["versions"].items() if version)
    yield f"device     {device['title']}" + (f" ({device['note']})" if device["note"] else "")
    assumed = "" if device["here"] else ", assumed there"
    yield f"choice     {choice['name']}" + (f"   {versions}{assumed}" if versions else "")
    if choice["note"]:
        yield f"           {choice['note']}"
    yield (
        f"predicted  {format_seconds(choice['seconds'])} {choice['work']} ({choice['basis']})    "
        f"peak {format_bytes(choice['peak_bytes'])} beside {format_bytes(choice['inputs_and_output_bytes'])} "
        "of inputs and output"
    )
    yield f"does       {_does(found['does'])}"
    yield from _mask_and_passes(found)
    yield from _op_table(found["ops"])
    yield from _others(found["others"], choice["seconds"])


def _does(does: dict[str, Any]) -> str:
    each = " per branch" if does["branches"] > 1 else ""
    proved = f"each proved covered exactly once{each}"
    if does["pairs"] is None:
        return f"pairs depend on the operands of each call; {proved}"
    share = 100 * does["pairs"] / does["dense_pairs"]
    return f"{share:.3g} % of the {does['dense']} ({format_count(does['pairs'])} pairs), {proved}"


def _mask_and_passes(found: dict[str, Any]) -> Iterator[str]:
    passes = [f"{p['name']:<14} {p['before']:>3} -> {p['after']} ops" for p in found["passes"]]
    rows = found["mask"]
    for i in range(max(len(rows), len(passes))):
        label = "mask       " if i == 0 else "           "
        row = rows[i] if i < len(rows) else ""
        yield f"{label}{row:<{TILES}}   {passes[i] if i < len(passes) else ''}".rstrip()


def _op_table(ops: list[dict[str, Any]]) -> Iterator[str]:
    shown, hidden = _worth_showing(ops)
    names = [f"%{o['id']} {o['op']} {o['what']}" for o in shown]
    width = max([len(n) for n in names] + [20])
    results = max([len(o["result"]) for o in shown] + [6])
    yield ""
    yield (f"  {'op':<{width}}  {'result':<{results}}  {'GFLOP':>8} {'MiB':>8} {'us':>9}  {'bound':<8} % of roofline")
    for name, o in zip(names, shown, strict=True):
        gflop = _number(o["gflop"]) if o["gflop"] else "-"
        roofline = f"{100 * o['roofline']:.0f}" if o["seconds"] else "-"
        yield (
            f"  {name:<{width}}  {o['result']:<{results}}  {gflop:>8} {_number(o['bytes'] / 2**20):>8} "
            f"{_number(o['seconds'] * 1e6):>9}  {o['bound'] if o['seconds'] else '-':<8} {roofline}"
        )
    if hidden:
        yield f"  ... and {hidden} more, views or below 1 % of the time each; --json lists all"


def _number(value: float) -> str:
    """Write three significant digits, or the whole number where it has more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _worth_showing(ops: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    if len(ops) <= 12:
        return ops, 0
    total = sum(o["seconds"] for o in ops)
    shown = [o for o in ops if o["seconds"] > 0.01 * total]
    return shown, len(ops) - len(shown)


def _others(others: list[dict[str, Any]], best: float) -> Iterator[str]:
    if not others:
        return
    width = max(len(o["name"]) for o in others)
    yield ""
    for i, other in enumerate(others):
        label = "others     " if i == 0 else "           "
        if other["refused"]:
            reasons = other["refused"]
            yield f"{label}{other['name']:<{width}}  refused   {reasons[0]}"
            yield from (f"{'':<{11 + width}}            {reason}" for reason in reasons[1:])
            continue
        ratio = other["seconds"] / best
        factor = f"+{100 * (ratio - 1):.0f} %" if ratio < 2 else f"x {ratio:.3g}"
        peak = format_bytes(other["peak_bytes"])
        yield f"{label}{other['name']:<{width}}  {format_seconds(other['seconds']):<9} {factor:<8} peak {peak}"
