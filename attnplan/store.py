"""Plans as files: data only, with a schema, a checksum and a proof.

A file holds the spec, the choice and the graph as text. Reading one parses data and executes nothing; the graph is
type-checked, and its coverage proved against the spec, as if a pass had just built it. What was predicted when the
plan was made stands beside them as a record: it is shown, and decides nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from attnplan.backends import registry
from attnplan.cost import Target, catalogue, resolve
from attnplan.errors import AttnPlanError, SpecError, did_you_mean
from attnplan.ir import Attend, Graph, Input, Output, parse_graph, print_graph
from attnplan.ir.coverage import check_coverage, coverage, spec_coverage, spec_inputs
from attnplan.lower import lower
from attnplan.memory_budget import title
from attnplan.passes import Chunk, Recompute, Step
from attnplan.passes.base import Pass
from attnplan.passes.chunk import check_pieces
from attnplan.search import Candidate, Found, Lowered, fusion_missing, priced
from attnplan.spec import AttentionSpec
from attnplan.strategies import STRATEGIES

if TYPE_CHECKING:
    from attnplan.plan import Plan

SCHEMA = 1
"""Version of the file format."""
MAX_BYTES = 64 * 2**20
MAX_HEADS = 2**16
_FIELDS = {
    "attnplan_plan": int,
    "spec": dict,
    "device": str,
    "here": str,
    "backend": str,
    "schedule": str,
    "strategy": str,
    "pins": dict,
    "fingerprint": str,
    "graph": list,
    "digest": str,
}
_PINS: dict[str, Any] = {"backend": str, "strategy": str, "max_memory": (int, type(None))}
_FLAGS: dict[str, Any] = {"deterministic": bool, "strict": bool}
STALE = ("error", "keep")


@attrs.frozen
class Record:
    """What was predicted when a plan was saved, by the versions that made it."""

    fingerprint: str
    """Those versions."""
    choice: str
    seconds: float
    peak_bytes: int
    basis: str
    passes: tuple[tuple[str, int, int], ...]
    """Name, ops before and ops after of each pass."""
    candidates: Mapping[str, float | tuple[str, ...]]
    """Predicted seconds of each way to run the spec, or the reasons why it was refused."""

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data, without the fingerprint, which stands in the file already."""
        data = attrs.asdict(self, recurse=False)
        del data["fingerprint"]
        candidates = {n: list(says) if isinstance(says, tuple) else says for n, says in self.candidates.items()}
        return {**data, "passes": [list(one) for one in self.passes], "candidates": candidates}


def record(plan: Plan, fingerprint: str) -> Record:
    """Return what this version predicts of a plan, and of the ways that it did not take."""
    best = plan.predicted
    return Record(
        fingerprint,
        plan.choice,
        best.seconds,
        best.peak_bytes,
        best.basis,
        tuple((step.name, step.before, step.after) for step in plan.steps),
        {c.name: c.prediction.seconds if c.prediction and not c.reasons else c.reasons for c in plan.candidates},
    )


def _read_record(data: Any, fingerprint: str) -> Record:
    """Return the record that a file holds, after looking at every part of it."""
    kinds = {"choice": str, "seconds": float, "peak_bytes": int, "basis": str, "passes": list, "candidates": dict}
    if not isinstance(data, dict) or data.keys() != kinds.keys():
        raise SpecError(f"'record' must hold {', '.join(kinds)}")
    for name, kind in kinds.items():
        if not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise SpecError(f"{name!r} of 'record' must be {kind.__name__}, got {type(data[name]).__name__}")
    if not 0 < data["seconds"] < float("inf") or data["peak_bytes"] < 0:
        raise SpecError("'record' must hold a positive time and a size")
    candidates = {name: _read_says(name, says) for name, says in data["candidates"].items()}
    passes = tuple(_read_pass(one) for one in data["passes"])
    return Record(**{**data, "fingerprint": fingerprint, "passes": passes, "candidates": candidates})


def _read_pass(found: Any) -> tuple[str, int, int]:
    if not isinstance(found, list) or [type(x) for x in found] != [str, int, int]:
        raise SpecError(f"a pass of 'record' must be a name and two counts, got {found!r}")
    return found[0], found[1], found[2]


def _read_says(name: str, found: Any) -> float | tuple[str, ...]:
    if isinstance(found, float) and 0 < found < float("inf"):
        return found
    if isinstance(found, list) and all(isinstance(x, str) for x in found):
        return tuple(found)
    raise SpecError(f"candidate {name!r} of 'record' must have a time or reasons, got {found!r}")


@attrs.frozen
class Saved(Pass):
    """Stands in the record of passes for a graph that was read from a file."""

    name: ClassVar[str] = "load"

    def __call__(self, graph: Graph) -> Graph:
        """Return the graph."""
        return graph


def dump(plan: Plan, fingerprint: str, *, recorded: bool = False) -> str:
    """Return a plan as the text of a file, with what was predicted of it if ``recorded``.

    Raises
    ------
    SpecError
        If the pattern holds a Python function, which is no data.
    """
    data: dict[str, Any] = {
        "attnplan_plan": SCHEMA,
        "spec": plan.spec.to_dict(),
        "device": plan.device.name,
        "here": plan.target.torch_device or "",
        "backend": plan.backend,
        "schedule": plan.schedule,
        "strategy": plan.strategy,
        "pins": plan.pins,
        "fingerprint": fingerprint,
        "graph": print_graph(plan.graph).splitlines(),
    }
    if recorded:
        data["record"] = record(plan, fingerprint).to_data()
    return json.dumps({**data, "digest": _digest(data)}, indent=1) + "\n"


def _digest(data: dict[str, Any]) -> str:
    content = {name: value for name, value in data.items() if name != "digest"}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


@attrs.frozen
class Loaded:
    """What a file says, checked and proved."""

    spec: AttentionSpec
    target: Target
    found: Found
    pins: dict[str, Any]
    record: Record | None = None


def read(path: str | Path) -> str:
    """Return the text of a plan file.

    Raises
    ------
    SpecError
        If the file cannot be read, is no text, or is too large to be a plan.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError(f"cannot read the plan file {str(path)!r}: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise SpecError(f"{str(path)!r} is larger than any plan: over {MAX_BYTES} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise SpecError(f"{str(path)!r} is no plan file: it is not UTF-8 text") from None


def parse(text: str, name: str, fingerprint: str, stale: str = "error") -> Loaded:
    """Read the text of a plan file: data is parsed and proved, nothing is executed.

    Parameters
    ----------
    text
        Text of the file.
    name
        What errors call it.
    fingerprint
        Versions of this process, compared with those of the file.
    stale
        ``"error"`` refuses a plan of other versions; ``"keep"`` takes it as it is.

    Raises
    ------
    SpecError
        If the file is truncated, altered, of another schema, stale, or names something that does not exist.
    VerifyError
        If the graph does not compute what the spec says.
    """
    if stale not in STALE:
        raise SpecError(f"unknown stale={stale!r}{did_you_mean(str(stale), STALE)}")
    data = _checked(text, name)
    if data["fingerprint"] != fingerprint and stale == "error":
        raise SpecError(
            f"{name} was planned with {data['fingerprint']}; here are {fingerprint}. Another version may choose "
            "otherwise: compile the spec again, or take the plan as it is with stale='keep'"
        )
    try:
        return _rebuilt(data)
    except AttnPlanError as error:
        raise type(error)(f"{name}: {error}") from None
    except (RecursionError, MemoryError, OverflowError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise SpecError(f"{name} describes no plan: {type(error).__name__}: {error}") from None


def _checked(text: str, name: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{name} is no plan file, or was cut off: {error}") from None
    if not isinstance(data, dict) or "attnplan_plan" not in data:
        raise SpecError(f"{name} is no plan file: it has no key 'attnplan_plan'")
    if data["attnplan_plan"] != SCHEMA:
        raise SpecError(f"{name} has schema {data['attnplan_plan']!r}, this version reads {SCHEMA}")
    for field, kind in _FIELDS.items():
        if not isinstance(data.get(field), kind):
            raise SpecError(f"{name}: {field!r} must be {kind.__name__}, got {type(data.get(field)).__name__}")
    unknown = sorted(set(data) - {*_FIELDS, "record"})
    if unknown:
        raise SpecError(f"{name} has unknown key {unknown[0]!r}{did_you_mean(unknown[0], [*_FIELDS, 'record'])}")
    if data["digest"] != _digest(data):
        raise SpecError(f"{name} was altered after it was saved: its digest does not fit")
    pins = data["pins"]
    kinds = {**_PINS, **_FLAGS}
    if not set(_PINS) <= set(pins) <= set(kinds) or any(not isinstance(pins[n], kinds[n]) for n in pins):
        raise SpecError(f"{name}: 'pins' must hold {', '.join(_PINS)}, each of its type")
    return data


def _rebuilt(data: dict[str, Any]) -> Loaded:
    spec = AttentionSpec.from_dict(data["spec"])
    if data["strategy"] not in STRATEGIES:
        raise SpecError(f"there is no strategy {data['strategy']!r}{did_you_mean(data['strategy'], STRATEGIES)}")
    target = _target(data["device"], data["here"])
    backend = registry().get(data["backend"])
    schedules = {s.name: s for s in backend.schedules(target.device)}
    if data["schedule"] not in schedules:
        raise SpecError(
            f"{backend.name} has no schedule {data['schedule']!r}{did_you_mean(data['schedule'], schedules)}"
        )
    schedule = schedules[data["schedule"]]
    if not all(isinstance(line, str) for line in data["graph"]):
        raise SpecError("'graph' must hold lines of text")
    graph = parse_graph("\n".join(data["graph"]))
    graph.verify()
    expected = spec_inputs(spec)
    if frozenset(op for _, op in graph.of(Input)) != expected:  # before any sum over heads that a file made up
        raise SpecError("the graph does not take the inputs of the spec")
    if spec.heads > MAX_HEADS:
        raise SpecError(f"{spec.heads} heads are more than any plan has; the limit is {MAX_HEADS}")
    check_coverage(spec_coverage(spec), coverage(graph), "the saved graph")
    check_pieces(graph)
    kept = _read_record(data["record"], data["fingerprint"]) if "record" in data else None
    reasons = (*backend.refuse(graph, spec, schedule, target.device), *fusion_missing(graph, target))
    if reasons:
        raise SpecError(f"{backend.name} ({schedule.name}) refuses the saved graph: {'; '.join(reasons)}")
    loops = _loops(graph)
    steps = tuple(Step(one, len(graph), len(graph), 0.0, graph) for one in loops)
    steps = (Step(Saved(), len(lower(spec)), len(graph), 0.0, graph), *steps)
    lowered = Lowered(data["strategy"], graph, steps)
    prediction = priced(graph, spec, schedule, target)
    candidate = Candidate(data["strategy"], backend.name, schedule.name, prediction, loop=_loop_title(loops))
    found = Found(lowered, candidate, backend, schedule, (candidate,))
    return Loaded(spec, target, found, dict(data["pins"]), kept)


def _loops(graph: Graph) -> tuple[Pass, ...]:
    """Return the passes that a graph was fitted to a budget by: calls of other lengths apply them anew."""
    output = graph.output.op
    assert isinstance(output, Output)
    block = next((op.loop for _, op in graph.of(Attend) if op.loop is not None), None)
    found: list[Pass] = [Recompute()] if output.recompute else []
    return (*found, *([Chunk(output.loop, block)] if output.loop or block else []))


def _loop_title(loops: tuple[Pass, ...]) -> str:
    return ", ".join(title(one.loop, one.block) if isinstance(one, Chunk) else one.name for one in loops)


def _target(device: str, here: str) -> Target:
    """Return the device of a saved plan: the one that is here if it is, else the one of the catalogue."""
    if not here:
        return resolve(device)
    target = resolve(here)
    if target.device.name == device:
        return target
    if device in catalogue():
        return resolve(device)
    raise SpecError(f"the plan is for device {device!r}, {here!r} is {target.device.name!r} here")
