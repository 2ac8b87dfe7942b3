"""Two plans side by side: what changes in choice, passes, ops and cost, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnplan.api import fingerprint
from attnplan.cost import price
from attnplan.explain import require_one_device
from attnplan.plan import Plan
from attnplan.spec import AttentionSpec
from attnplan.store import Record, record
from attnplan.units import format_bytes, format_seconds

SCHEMA = 2
"""Version of the dict that :func:`diff` returns."""


def diff(a: Plan, b: Plan) -> dict[str, Any]:
    """Return what differs between two plans, as plain data.

    Keys: ``schema``; ``spec`` (fields that differ); ``versions`` (a pair, empty where equal); ``device``, ``choice``,
    ``seconds``, ``basis``, ``data_sheet_seconds``, ``peak_bytes`` (a pair each); ``passes`` and ``ops`` (pairs, empty
    where equal); ``candidates`` (predicted seconds or refusals of each way in both); ``why`` (sentences).
    docs/explain.md says what every key holds.

    Parameters
    ----------
    a, b
        Plans, compiled or loaded. A loaded one is priced as this version prices it, so that the two compare; its passes
        and candidates are those that were recorded when it was saved.

    Raises
    ------
    RingError
        If one is a plan over several ranks.
    SpecError
        If a pattern holds a Python function.

    Examples
    --------
    >>> import attnplan
    >>> spec = attnplan.AttentionSpec(seq_len=4096, heads=8, head_dim=64, causal=True, dtype="float16")
    >>> found = diff(attnplan.compile(spec, "h100"), attnplan.compile(spec, "t4"))
    >>> found["device"], found["basis"]
    (['h100', 't4'], ['calibrated elsewhere', 'data sheet'])
    """
    for plan in (a, b):
        require_one_device(plan, "a diff")
    then = [plan.saved or record(plan, fingerprint()) for plan in (a, b)]
    return {
        "schema": SCHEMA,
        "spec": _spec_changes(a.spec, b.spec),
        "versions": _pair(then[0].fingerprint, then[1].fingerprint),
        "device": [a.device.name, b.device.name],
        "choice": [a.choice, b.choice],
        "seconds": [a.predicted.seconds, b.predicted.seconds],
        "basis": [a.predicted.basis, b.predicted.basis],
        "data_sheet_seconds": [published_seconds(a), published_seconds(b)],
        "peak_bytes": [a.predicted.peak_bytes, b.predicted.peak_bytes],
        "passes": _pair(_passes(then[0]), _passes(then[1])),
        "ops": _ops(a, b),
        "candidates": _candidates(*then),
        "why": [*_why((a, b), then), *_repriced((a, b)), *_other_basis(a, b)],
    }


def published_seconds(plan: Plan) -> float:
    """Return what a plan takes by published figures alone, whatever calibration it was priced with."""
    return price(plan.graph, plan.spec, plan._schedule.priced, plan.device).seconds


def _pair(a: Any, b: Any) -> list[Any]:
    return [] if a == b else [a, b]


def _spec_changes(a: AttentionSpec, b: AttentionSpec) -> dict[str, list[Any]]:
    left, right = a.to_dict(), b.to_dict()
    return {n: [left.get(n), right.get(n)] for n in dict.fromkeys([*left, *right]) if left.get(n) != right.get(n)}


def _passes(of: Record) -> list[str]:
    return [f"{name} {before} -> {after}" for name, before, after in of.passes]


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


def _candidates(a: Record, b: Record) -> dict[str, list[Any]]:
    return {n: [_says(side, n) for side in (a, b)] for n in dict.fromkeys([*a.candidates, *b.candidates])}


def _says(of: Record, name: str) -> Any:
    found = of.candidates.get(name)
    return list(found) if isinstance(found, tuple) else found


def _why(plans: Sequence[Plan], then: Sequence[Record]) -> Iterator[str]:
    """Say in words why the choice changed: the way not taken is refused, missing or dearer on the other side."""
    if plans[0].choice == plans[1].choice:
        yield f"the choice stays {plans[0].choice}"
        return
    for there, here, name in ((1, 0, "B"), (0, 1, "A")):
        choice, found = plans[here].choice, then[there].candidates.get(plans[here].choice)
        if found is None:
            yield f"{choice} {_missing(plans[here], plans[there], then[there], name)}"
        elif isinstance(found, tuple):
            yield f"{name} refuses {choice}: {'; '.join(found)}"
        else:
            taken = f"{plans[there].choice} takes {format_seconds(then[there].seconds)}"
            yield f"for {name}, {choice} would take {format_seconds(found)}, {taken}"


def _missing(of: Plan, there: Plan, then: Record, name: str) -> str:
    """Say why a choice is not among the candidates of the other side."""
    if there.saved is None and len(then.candidates) == 1:
        return f"is unknown to {name}, whose file holds no other candidates"
    plain = f"{of.strategy} > {of.backend} ({of.schedule})"
    if plain != of.choice and plain in then.candidates:
        return f"is not what {name} needs: there, {plain} is looped over otherwise or not at all"
    return f"does not exist for {name}"


def _repriced(plans: Sequence[Plan]) -> Iterator[str]:
    """Say where a saved plan was predicted to take something else by those who saved it."""
    for plan, name in zip(plans, "AB", strict=True):
        if plan.saved is not None and abs(plan.saved.seconds / plan.predicted.seconds - 1) > 0.005:
            then = f"{format_seconds(plan.saved.seconds)} ({plan.saved.basis})"
            now = f"{format_seconds(plan.predicted.seconds)} ({plan.predicted.basis})"
            yield f"{name} was predicted to take {then} when it was saved; here the same plan is priced at {now}"


def _other_basis(a: Plan, b: Plan) -> Iterator[str]:
    if a.predicted.basis != b.predicted.basis:
        both = _ratio([published_seconds(a), published_seconds(b)], format_seconds)
        yield f"the two predictions do not rest on the same figures; by the data sheet alone {both}"


def render(found: Mapping[str, Any]) -> str:
    """Return a diff as text."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name, (left, right) in found["spec"].items():
        yield f"{name:<11}{_shown(left)} -> {_shown(right)}"
    if found["versions"]:
        yield f"{'versions':<11}{_changed_versions(*found['versions'])}"
    for name in ("device", "choice"):
        left, right = found[name]
        yield f"{name:<11}{left}" + ("" if left == right else f" -> {right}")
    yield f"{'predicted':<11}{_predicted(found)}"
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


def _changed_versions(a: str, b: str) -> str:
    """Return the packages whose versions differ between two fingerprints.

    Examples
    --------
    >>> _changed_versions("attnplan 0.1.0, torch 2.11.0", "attnplan 0.1.0, torch 2.13.0, triton 3.6.0")
    'torch 2.11.0 -> 2.13.0, triton not installed -> 3.6.0'
    """
    sides = [{name: version for name, _, version in (x.partition(" ") for x in text.split(", "))} for text in (a, b)]
    names = [n for n in dict.fromkeys([*sides[0], *sides[1]]) if sides[0].get(n) != sides[1].get(n)]
    return ", ".join(f"{n} {' -> '.join(side.get(n, 'not installed') for side in sides)}" for n in names)


def _predicted(found: Mapping[str, Any]) -> str:
    """Return both times with their basis, and their ratio if that is the same."""
    (left, right), bases = found["seconds"], found["basis"]
    if bases[0] == bases[1]:
        return f"{_ratio((left, right), format_seconds)}   ({bases[0]})"
    return f"{format_seconds(left)} ({bases[0]}) -> {format_seconds(right)} ({bases[1]})"


def _candidate_lines(candidates: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """Show what either side accepts; the rest is counted."""
    shown = {n: pair for n, pair in candidates.items() if any(isinstance(says, float) for says in pair)}
    width = max([len(n) for n in shown] + [0])
    for name, pair in shown.items():
        if any(isinstance(says, list) for says in pair):
            for side, says in zip("AB", pair, strict=True):
                yield f"  {name if side == 'A' else '':<{width}}  {side}  {_side(says)}"
        else:
            yield f"  {name:<{width}}     {' -> '.join(map(_side, pair))}"
    if len(shown) < len(candidates):
        yield f"  and {len(candidates) - len(shown)} more that neither takes; --json has the reasons"


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
