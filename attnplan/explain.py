"""The page that people read before they trust a plan, and the same facts as a dict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attnplan.cost.tiles import attend_tiles
from attnplan.errors import RingError, SpecError
from attnplan.explain_tables import compiles, other_candidates
from attnplan.ir import Attend, Graph, Input, Merge, Mix, Node, Output, Receive, RowMap, Take
from attnplan.ir.slots import slot_condition
from attnplan.mask_text import TILES, mask_lines
from attnplan.search import Candidate
from attnplan.spec import AttentionSpec, Dim
from attnplan.units import format_bytes, format_count, format_number, format_seconds

if TYPE_CHECKING:
    from attnplan.measure import Measured
    from attnplan.plan import Plan
    from attnplan.store import Record

SCHEMA = 2
"""Version of the dict that :func:`facts` returns; docs/explain.md says what every key holds."""


def facts(plan: Plan, measured: Measured | None = None) -> dict[str, Any]:
    """Return everything that an explain page says, as plain data.

    Parameters
    ----------
    plan
        The plan.
    measured
        What calls of it took, to be shown beside what was predicted.

    Returns
    -------
    dict
        Keys: ``schema``, ``spec``, ``device``, ``choice``, ``measured``, ``tuning``, ``saved``, ``does``, ``mask``,
        ``passes``, ``ops``, ``others``. See ``docs/explain.md``.
    """
    require_one_device(plan, "this page")
    chosen = next(c for c in plan.candidates if c.prediction is plan.predicted)
    return {
        "schema": SCHEMA,
        "spec": _spec_facts(plan.spec),
        "device": {
            "name": plan.device.name,
            "title": plan.device.title,
            "kind": plan.device.kind,
            "here": plan.target.torch_device is not None,
            "note": plan.target.note,
            "source": plan.device.source,
        },
        "choice": {
            **_candidate_facts(chosen),
            "versions": plan._backend.versions(),
            "note": getattr(plan._backend, "note", ""),
            "basis": plan.predicted.basis,
            "basis_note": plan.predicted.note,
            "host_seconds": plan.predicted.host,
            "memory": {
                "workspace_bytes": plan.predicted.memory.workspace,
                "gathered_bytes": plan.predicted.memory.gathered,
                "saved_bytes": plan.predicted.memory.saved,
                "budget_bytes": plan.pins.get("max_memory"),
            },
            "inputs_and_output_bytes": _io_bytes(plan.spec),
            "work": "forward and backward" if plan.spec.training else "forward",
        },
        "measured": None if measured is None else measured.facts(),
        "tuning": None if plan.tuning is None else plan.tuning.facts(),
        "saved": None if plan.saved is None else _saved_facts(plan.saved),
        "does": _share(plan.spec),
        "mask": mask_lines(plan.spec),
        "passes": _passes(plan),
        "ops": [_op_facts(plan, n, measured) for n in plan.graph if not isinstance(n.op, Input | Output)],
        "others": [_candidate_facts(c) for c in plan.candidates if c is not chosen],
    }


def _passes(plan: Plan) -> list[dict[str, Any]]:
    """Return the passes that ran; of a plan from a file, those that ran when it was made."""
    if plan.saved is not None:
        return [
            {"name": n, "before": before, "after": after, "seconds": None} for n, before, after in plan.saved.passes
        ]
    return [{"name": s.name, "before": s.before, "after": s.after, "seconds": s.seconds} for s in plan.steps]


def _saved_facts(saved: Record) -> dict[str, Any]:
    return {"versions": saved.fingerprint, "seconds": saved.seconds, "peak_bytes": saved.peak_bytes,
            "basis": saved.basis}  # fmt: skip


def require_one_device(plan: Plan, what: str) -> None:
    """Raise :class:`~attnplan.errors.RingError` for a plan over several ranks, which has no figures for each op."""
    ranks = getattr(plan, "ranks", 1)
    if ranks > 1:
        raise RingError(
            f"{what} is for plans on one device, this one has {ranks} ranks: use `attnplan explain` and `attnplan draw "
            "--what ring`"
        )


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
        "compile_seconds": None if prediction is None else prediction.compile_seconds,
        "peak_bytes": None if prediction is None else prediction.peak_bytes,
        "refused": list(candidate.reasons),
    }


def _io_bytes(spec: AttentionSpec) -> int:
    from attnplan.cost.setting import ITEM_BYTES

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


def _op_facts(plan: Plan, node: Node, measured: Measured | None) -> dict[str, Any]:
    op = plan.predicted.ops[node.id]
    return {
        "id": node.id,
        "op": node.op.name,
        "what": _what(plan.graph, node, plan.spec, copied=op.cost.bytes > 0),
        "result": str(node.type),
        "gflop": op.cost.flops / 1e9,
        "exps": op.cost.exps,
        "bytes": op.cost.bytes + op.cost.copied + op.cost.made,
        "seconds": op.seconds,
        "measured_seconds": None if measured is None or measured.ops is None else measured.ops.get(node.id),
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
        loop = "" if op.loop is None else f", {op.loop[0]}x{op.loop[1]} at a time"
        launch = "" if op.launch is None else f", launch {op.launch}"
        return f"{condition}, {blocks} x {square}{loop}{launch}"
    if isinstance(op, Take):
        return f"{graph.args(node)[0].type.tensor}, {'copy' if copied else 'view'}"
    if isinstance(op, Receive):
        sent = sum(count for _, count in op.peers)
        return f"{node.type.tensor}, hop {op.hop}, {format_count(sent)} elements of {len(op.peers)} ranks"
    rule = f"{op.rule}, " if isinstance(op, Mix) else ""
    pull = ", pull" if isinstance(op, Merge | Mix) and op.pull else ""
    return f"{rule}{len(node.args)} parts{pull}"


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
        once = f", about {format_seconds(choice['compile_seconds'])}" if choice["compile_seconds"] else ""
        yield f"           {choice['note']}{once}"
    yield (
        f"predicted  {format_seconds(choice['seconds'])} {choice['work']} ({choice['basis']})    "
        f"peak {format_bytes(choice['peak_bytes'])} beside {format_bytes(choice['inputs_and_output_bytes'])} "
        "of inputs and output"
    )
    yield from _basis(found)
    if found["measured"] is not None:
        yield from _measured(found["measured"], choice)
    if found["tuning"] is not None:
        yield f"tuned      {_tuned(found['tuning'])}"
    if found["saved"] is not None:
        then = f"{format_seconds(found['saved']['seconds'])} ({found['saved']['basis']})"
        yield f"saved      predicted to take {then} by {found['saved']['versions']}"
    yield f"does       {_does(found['does'])}"
    yield from _mask_and_passes(found)
    yield from _op_table(found["ops"])
    yield from other_candidates(
        found["others"],
        choice["seconds"],
        lambda one: f"peak {format_bytes(one['peak_bytes'])}{compiles(one['compile_seconds'])}",
    )


def _basis(found: dict[str, Any]) -> Iterator[str]:
    """Say what the prediction consists of, where there is something to say."""
    choice, memory = found["choice"], found["choice"]["memory"]
    ops = sum(o["seconds"] for o in found["ops"])
    if found["device"]["kind"] != "cpu" and choice["host_seconds"] > ops:
        yield (
            f"           the host needs {format_seconds(choice['host_seconds'])} to start it, the device "
            f"{format_seconds(ops)} for its ops"
        )
    parts = [(memory[f"{name}_bytes"], word) for name, word in _MEMORY.items() if memory[f"{name}_bytes"]]
    if parts or memory["budget_bytes"] is not None:
        of = ", ".join(f"{format_bytes(size)} {word}" for size, word in parts) or "nothing"
        budget = "" if memory["budget_bytes"] is None else f"    budget {format_bytes(memory['budget_bytes'])}"
        yield f"           of the peak: {of}{budget}"
    if choice["basis_note"]:
        yield f"           {choice['basis_note']}"


def _tuned(tuning: dict[str, Any]) -> str:
    """Say what a measured search chose, and how far off the prices were."""
    off = f"the price is off by {100 * tuning['error']:+.0f} %"
    gain = f", the cheapest by price takes {100 * tuning['gain']:+.0f} %" if tuning["gain"] else ""
    when = "remembered from an earlier measurement" if tuning["remembered"] else "measured now"
    return f"fastest of {len(tuning['trials'])}, {format_seconds(tuning['seconds'])}; {off}{gain}; {when}"


_MEMORY = {"workspace": "workspace", "gathered": "copies of rows", "saved": "saved for the backward"}


def _measured(measured: dict[str, Any], choice: dict[str, Any]) -> Iterator[str]:
    ratio = measured["seconds"] / choice["seconds"]
    yield (
        f"measured   {format_seconds(measured['seconds'])} {choice['work']}, x {ratio:.3g} of predicted    median of "
        f"{measured['rounds']}, {format_seconds(measured['fastest_seconds'])} to "
        f"{format_seconds(measured['slowest_seconds'])} ({measured['timer']})"
    )
    if measured["ops_seconds"] is not None:
        share = 100 * measured["ops_seconds"] / measured["seconds"]
        other = f", {format_seconds(measured['other_seconds'])} of it in no op" if measured["other_seconds"] else ""
        yield f"           run op by op {format_seconds(measured['ops_seconds'])}, {share:.0f} % of that{other}"
    if measured["note"]:
        yield f"           {measured['note']}"


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
    measured = any(o["measured_seconds"] is not None for o in ops)
    extra = f" {'measured':>9}" if measured else ""
    numbers = f"{'GFLOP':>8} {'MiB':>8} {'us':>9}{extra}"
    yield f"  {'op':<{width}}  {'result':<{results}}  {numbers}  {'bound':<8} % of roofline"
    for name, o in zip(names, shown, strict=True):
        gflop = format_number(o["gflop"]) if o["gflop"] else "-"
        roofline = f"{100 * o['roofline']:.0f}" if o["seconds"] else "-"
        extra = f" {format_number(o['measured_seconds'] * 1e6):>9}" if measured else ""
        yield (
            f"  {name:<{width}}  {o['result']:<{results}}  {gflop:>8} {format_number(o['bytes'] / 2**20):>8} "
            f"{format_number(o['seconds'] * 1e6):>9}{extra}  {o['bound'] if o['seconds'] else '-':<8} {roofline}"
        )
    if hidden:
        yield f"  ... and {hidden} more, views or below 1 % of the time each; --json lists all"


def _worth_showing(ops: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    if len(ops) <= 12:
        return ops, 0
    columns = [[o[name] or 0.0 for o in ops] for name in ("seconds", "measured_seconds")]
    limits = [0.01 * sum(column) for column in columns]
    shown = [
        o for o, *times in zip(ops, *columns, strict=True) if any(t > x for t, x in zip(times, limits, strict=True))
    ]
    return shown, len(ops) - len(shown)
