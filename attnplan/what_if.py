"""What-if tables: a spec as it is, and under each set of changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import attrs

from attnplan.compare import published_seconds
from attnplan.cost import Target, resolve
from attnplan.errors import AttnPlanError, RingError, SpecError, did_you_mean
from attnplan.plan import Plan
from attnplan.search import search
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes, format_seconds, parse_bytes, parse_count

SCHEMA = 1
"""Version of the dict that :func:`facts` returns."""
PLAN_FIELDS = ("device", "backend", "strategy", "max_memory")


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


_MIXED = "factors compare the figures of the data sheet where two rows do not rest on the same"


def one_basis(rows: Sequence[Row]) -> bool:
    """Return whether the predictions of all rows rest on the same kind of figures."""
    return len({row.plan.predicted.basis for row in rows if row.plan is not None}) <= 1


def render(rows: Sequence[Row]) -> str:
    """Return a what-if table as text: times, and how they compare with the first row's, on one basis."""
    same = one_basis(rows)
    heads = ["", "choice", "predicted", *([] if same else ["basis", "by the data sheet"]), "", "peak"]
    cells: list[list[str]] = [heads]
    cells += [_cells(row, rows[0], same) for row in rows]
    widths = [max(len(c[i]) for c in cells if len(c) == len(heads)) for i in range(len(heads))]
    widths[0] = max(len(c[0]) for c in cells)
    lines = ["  ".join(f"{x:<{w}}" for x, w in zip(c, widths, strict=False)).rstrip() for c in cells]
    bases = {row.plan.predicted.basis for row in rows if row.plan is not None}
    about = f"predictions: {bases.pop()}" if len(bases) == 1 else _MIXED
    return "\n".join([*lines, *([about] if rows[1:] and any(r.plan for r in rows) else [])]) + "\n"


def _cells(row: Row, first: Row, same: bool) -> list[str]:
    name = label(row)
    if row.plan is None:
        return [name, f"refused   {row.error.splitlines()[0]}"]
    plan, found = row.plan, row.plan.predicted
    extra = [] if same else [found.basis, format_seconds(published_seconds(plan))]
    return [
        name,
        plan.choice,
        format_seconds(found.seconds),
        *extra,
        factor(row, first),
        format_bytes(found.peak_bytes),
    ]


def factor(row: Row, first: Row) -> str:
    """Return how many times as long as the first row one takes; both by the data sheet if they have not one basis."""
    if row is first or row.plan is None or first.plan is None:
        return ""
    if one_basis((row, first)):
        return f"x {row.plan.predicted.seconds / first.plan.predicted.seconds:.3g}"
    return f"x {published_seconds(row.plan) / published_seconds(first.plan):.3g}"


def label(row: Row) -> str:
    """Return what a row changes, in words."""
    return ", ".join(f"{n}={format_bytes(v) if n == 'max_memory' else v}" for n, v in row.changes.items()) or "as it is"


def facts(rows: Sequence[Row]) -> dict[str, Any]:
    """Return a what-if table as plain data: ``schema`` and ``rows``; docs/explain.md says what every key holds."""
    return {"schema": SCHEMA, "rows": [_row_facts(row) for row in rows]}


def _row_facts(row: Row) -> dict[str, Any]:
    plan = row.plan
    return {
        "changes": dict(row.changes),
        "choice": None if plan is None else plan.choice,
        "seconds": None if plan is None else plan.predicted.seconds,
        "basis": None if plan is None else plan.predicted.basis,
        "data_sheet_seconds": None if plan is None else published_seconds(plan),
        "peak_bytes": None if plan is None else plan.predicted.peak_bytes,
        "error": row.error or None,
    }
