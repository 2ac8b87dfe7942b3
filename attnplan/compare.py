"""Two plans side by side, and many: what changes in choice, passes, ops and cost, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import attrs

from attnplan.cost import Target, resolve
from attnplan.errors import AttnPlanError, RingError, SpecError, did_you_mean
from attnplan.explain import require_one_device
from attnplan.plan import Plan
from attnplan.search import Candidate, search
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes, format_seconds, parse_bytes, parse_count

SCHEMA = 1
"""Version of the dict that :func:`diff` returns."""
PLAN_FIELDS = ("device", "backend", "strategy", "max_memory")


def diff(a: Plan, b: Plan) -> dict[str, Any]:
    """Return what differs between two plans, as plain data.

    Keys: ``schema``; ``spec`` (fields that differ); ``device``, ``choice``, ``seconds``, ``peak_bytes`` (a pair each);
    ``passes`` and ``ops`` (pairs, empty where equal); ``candidates`` (predicted seconds or refusals of each way in
    both); ``why`` (sentences).
    """
    for plan in (a, b):
        require_one_device(plan, "a diff")
    return {
        "schema": SCHEMA,
        "spec": _spec_changes(a.spec, b.spec),
        "device": [a.device.name, b.device.name],
        "choice": [_choice(a), _choice(b)],
        "seconds": [a.predicted.seconds, b.predicted.seconds],
        "peak_bytes": [a.predicted.peak_bytes, b.predicted.peak_bytes],
        "passes": _pair(_passes(a), _passes(b)),
        "ops": _ops(a, b),
        "candidates": _candidates(a, b),
        "why": list(_why(a, b)),
    }


def _choice(plan: Plan) -> str:
    return f"{plan.strategy} > {plan.backend} ({plan.schedule})"


def _pair(a: Any, b: Any) -> list[Any]:
    return [] if a == b else [a, b]


def _spec_changes(a: AttentionSpec, b: AttentionSpec) -> dict[str, list[Any]]:
    left, right = a.to_dict(), b.to_dict()
    return {n: [left.get(n), right.get(n)] for n in dict.fromkeys([*left, *right]) if left.get(n) != right.get(n)}


def _passes(plan: Plan) -> list[str]:
    return [f"{s.name} {s.before} -> {s.after}" for s in plan.steps]


def _ops(a: Plan, b: Plan) -> dict[str, list[Any]]:
    """Return for each kind of op how many there are and what they take together, where that differs."""
    found = []
    for plan in (a, b):
        count: Counter[str] = Counter(n.op.name for n in plan.graph)
        seconds: Counter[str] = Counter()
        for node, cost in zip(plan.graph, plan.predicted.ops, strict=True):
            seconds[node.op.name] += cost.seconds  # type: ignore[assignment]  # a Counter of floats
        found.append({name: {"count": count[name], "seconds": float(seconds[name])} for name in count})
    names = dict.fromkeys([*found[0], *found[1]])
    nothing = {"count": 0, "seconds": 0.0}
    pairs = {n: [found[0].get(n, nothing), found[1].get(n, nothing)] for n in names}
    return {n: pair for n, pair in pairs.items() if pair[0] != pair[1]}


def _candidates(a: Plan, b: Plan) -> dict[str, list[Any]]:
    sides = [{c.name: c for c in plan.candidates} for plan in (a, b)]
    names = dict.fromkeys([*sides[0], *sides[1]])
    return {n: [_says(side.get(n)) for side in sides] for n in names}


def _says(candidate: Candidate | None) -> Any:
    if candidate is None:
        return None
    fits = candidate.prediction is not None and not candidate.reasons
    return candidate.prediction.seconds if fits and candidate.prediction else list(candidate.reasons)


def _why(a: Plan, b: Plan) -> Iterator[str]:
    """Say in words why the choice changed: the way not taken is refused, missing or dearer on the other side."""
    if _choice(a) == _choice(b):
        yield f"the choice stays {_choice(a)}"
        return
    for there, here, plan in ((b, a, "B"), (a, b, "A")):
        name, seconds = _choice(here), there.predicted.seconds
        found = next((c for c in there.candidates if c.name == name), None)
        if found is None:
            yield f"{name} does not exist for {plan}"
        elif found.reasons or found.prediction is None:
            yield f"{plan} refuses {name}: {'; '.join(found.reasons)}"
        else:
            other = format_seconds(found.prediction.seconds)
            yield f"for {plan}, {name} would take {other}, {_choice(there)} takes {format_seconds(seconds)}"


def render(found: Mapping[str, Any]) -> str:
    """Return a diff as text."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name, (left, right) in found["spec"].items():
        yield f"{name:<11}{_shown(left)} -> {_shown(right)}"
    for name in ("device", "choice"):
        left, right = found[name]
        yield f"{name:<11}{left}" + ("" if left == right else f" -> {right}")
    yield f"{'predicted':<11}{_ratio(found['seconds'], format_seconds)}"
    yield f"{'peak':<11}{_ratio(found['peak_bytes'], format_bytes)}"
    for i, side in enumerate(found["passes"]):
        yield f"{'passes ' + 'AB'[i]:<11}{', '.join(side)}"
    for name, (left, right) in found["ops"].items():
        times = _ratio([left["seconds"], right["seconds"]], format_seconds)
        yield f"{'ops':<11}{name:<10} {left['count']:>4} -> {right['count']:<4} {times}"
    for i, why in enumerate(found["why"]):
        yield f"{'why' if i == 0 else '':<11}{why}"
    yield ""
    yield from _candidate_lines(found["candidates"])


def _candidate_lines(candidates: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """Show what either side accepts, and what they refuse for different reasons; the rest is counted."""
    shown = {n: pair for n, pair in candidates.items() if pair[0] != pair[1] or not isinstance(pair[0], list)}
    width = max([len(n) for n in shown] + [0])
    for name, pair in shown.items():
        if any(isinstance(says, list) for says in pair):
            for side, says in zip("AB", pair, strict=True):
                yield f"  {name if side == 'A' else '':<{width}}  {side}  {_side(says)}"
        else:
            yield f"  {name:<{width}}     {' -> '.join(map(_side, pair))}"
    if len(shown) < len(candidates):
        yield f"  and {len(candidates) - len(shown)} more, refused by both for the same reasons"


def _shown(value: Any) -> str:
    return "(default)" if value is None else str(value)


def _ratio(pair: Sequence[float], form: Any) -> str:
    left, right = pair
    if left == right:
        return str(form(left))
    factor = f"   x {right / left:.3g}" if left else ""
    return f"{form(left)} -> {form(right)}{factor}"


def _side(says: Any) -> str:
    if says is None:
        return "-"
    return f"refused   {'; '.join(says)}" if isinstance(says, list) else format_seconds(says)


@attrs.frozen
class Row:
    """One line of a what-if table: what was changed, and the plan or the refusal that it leads to."""

    changes: Mapping[str, Any]
    plan: Plan | None
    error: str = ""


def parse_changes(text: str) -> list[dict[str, Any]]:
    """Read ``"device=b200,seq_len=64k|1m,max_memory=4gib"``: one set of changes for each choice of alternatives.

    Raises
    ------
    SpecError
        If a name is no field of a spec or of a plan, or a value cannot be read.

    Examples
    --------
    >>> parse_changes("device=b200,seq_len=64k|1m")
    [{'device': 'b200', 'seq_len': 65536}, {'device': 'b200', 'seq_len': 1048576}]
    """
    fields = [f.name for f in attrs.fields(AttentionSpec)]
    names, values = [], []
    for part in text.split(","):
        name, equals, given = (x.strip() for x in part.partition("="))
        if not equals or not given:
            raise SpecError(f"cannot read {part!r}: write name=value, several values as name=a|b")
        if name not in (*fields, *PLAN_FIELDS):
            raise SpecError(f"--what-if knows no {name!r}{did_you_mean(name, [*fields, *PLAN_FIELDS])}")
        names.append(name)
        values.append([_value(name, one.strip()) for one in given.split("|")])
    return [dict(zip(names, each, strict=True)) for each in product(*values)]


_INTS = ("seq_len", "kv_len", "heads", "kv_heads", "head_dim", "value_dim", "batch", "ring_size")
_FLOATS = ("scale", "softcap", "dropout")
_FLAGS = {"true": True, "false": False, "yes": True, "no": False}


def _value(name: str, text: str) -> Any:
    if name in _INTS:
        return parse_count(text)
    if name == "max_memory":
        return parse_bytes(text)
    if name in ("causal", "training", "q_offset"):
        if text.lower() not in _FLAGS:
            raise SpecError(f"{name} must be true or false, got {text!r}")
        return _FLAGS[text.lower()]
    if name in _FLOATS:
        try:
            return float(text)
        except ValueError:
            raise SpecError(f"{name} must be a number, got {text!r}") from None
    return text


def what_if(spec: AttentionSpec, options: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Plan a spec as it is and under each set of changes.

    Parameters
    ----------
    spec, options
        The spec, and ``device``, ``backend``, ``strategy``, ``max_memory`` as :func:`attnplan.compile` takes them.
    changes
        Fields of the spec or of the options to change.

    Raises
    ------
    RingError
        If the spec is for several ranks.
    """
    _require_one_rank(spec)
    return [_row(spec, options, change) for change in ({}, *changes)]


def _require_one_rank(spec: AttentionSpec) -> None:
    if spec.ring_size > 1:
        raise RingError(
            f"--what-if is for plans on one device, the spec has ring_size={spec.ring_size}: use `attnplan explain "
            "--mesh`"
        )


def _row(spec: AttentionSpec, options: Mapping[str, Any], change: Mapping[str, Any]) -> Row:
    try:
        fields = {n: v for n, v in change.items() if n not in PLAN_FIELDS}
        if "seq_len" in fields and spec.kv_len == spec.seq_len:
            fields.setdefault("kv_len", fields["seq_len"])
        here = AttentionSpec.from_dict({**spec.to_dict(), **fields})
        _require_one_rank(here)
        given = {**options, **{n: v for n, v in change.items() if n in PLAN_FIELDS}}
        budget = given.get("max_memory")
        target: Target = resolve(given.get("device", "auto"))
        limit = None if budget is None else parse_bytes(budget)
        pins = {n: given.get(n, "auto") for n in ("backend", "strategy")}
        found = search(here, target, pins["backend"], pins["strategy"], limit)
        return Row(change, Plan(here, target, found, {**pins, "max_memory": limit}))
    except AttnPlanError as error:
        return Row(change, None, f"{type(error).__name__}: {error}")


def render_rows(rows: Sequence[Row]) -> str:
    """Return a what-if table as text."""
    names = [", ".join(f"{n}={_label(n, v)}" for n, v in row.changes.items()) or "as it is" for row in rows]
    choices = ["" if row.plan is None else _choice(row.plan) for row in rows]
    wide, wider = max(map(len, names)), max([len("choice"), *map(len, choices)])
    lines = [f"{'':<{wide}}  {'choice':<{wider}}  {'predicted':<9}  peak"]
    for name, choice, row in zip(names, choices, rows, strict=True):
        if row.plan is None:
            lines.append(f"{name:<{wide}}  refused   {row.error.splitlines()[0]}")
            continue
        seconds, peak = format_seconds(row.plan.predicted.seconds), format_bytes(row.plan.predicted.peak_bytes)
        lines.append(f"{name:<{wide}}  {choice:<{wider}}  {seconds:<9}  {peak}")
    return "\n".join(lines) + "\n"


def _label(name: str, value: Any) -> str:
    return format_bytes(value) if name == "max_memory" else str(value)


def rows_facts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a what-if table as plain data."""
    return [
        {
            "changes": dict(row.changes),
            "choice": None if row.plan is None else _choice(row.plan),
            "seconds": None if row.plan is None else row.plan.predicted.seconds,
            "peak_bytes": None if row.plan is None else row.plan.predicted.peak_bytes,
            "error": row.error or None,
        }
        for row in rows
    ]
