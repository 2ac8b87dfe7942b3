"""The command line: ``attnplan explain | run | verify | diff | suggest | opt | draw | report | devices | backends``."""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from typing import Any

import click

from attnplan import cli_compare, cli_measure, cli_pictures  # noqa: F401  # they add their commands to `main`
from attnplan.cli_common import (
    _JSON,
    _PLAN_OPTIONS,
    _SPEC_OPTIONS,
    _echo,
    _echo_json,
    _options,
    _plan,
    _progress,
    _spec,
    main,
)
from attnplan.errors import SpecError, did_you_mean
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes, format_seconds

__all__ = ["main"]


@main.command()
@click.argument("file", required=False)
@_options(_SPEC_OPTIONS, _PLAN_OPTIONS)
@click.option("--source", is_flag=True, help="Print the emitted program too.")
@click.option("--graph", "graph", is_flag=True, help="Print the graph too.")
@click.option("--ir", metavar="PASS", help="Print the graph after this pass, and nothing else.")
@click.option("--mesh", metavar="NODESxRANKS", help="Plan for so many ranks, such as 128x8, without a process.")
@click.option("--shards", default="auto", show_default=True, help="With --mesh: contiguous, zigzag or striped.")
@click.option("--transport", default="auto", show_default=True, help="With --mesh: how rows travel.")
@click.option("--measure", is_flag=True, help="Run it, and show what each op took beside what was predicted.")
@click.option("--what-if", metavar="CHANGES", multiple=True,
              help="Such as device=b200,seq_len=64k|1m,max_memory=4gib: a table, one row for each.")  # fmt: skip
@click.option("--save", metavar="PATH", help="Write the plan to a file, for `diff` and attnplan.load.")
@_JSON
def explain(file: str | None, device: str, backend: str, strategy: str, max_memory: str | None, source: bool,
            graph: bool, ir: str | None, measure: bool, what_if: tuple[str, ...], save: str | None, as_json: bool,
            mesh: str | None, shards: str, transport: str, **flags: Any) -> None:  # fmt: skip
    """Say what would run, why, and what it costs. Needs no torch, except for --measure and --source."""
    also = {"--graph": graph, "--source": source, "--measure": measure}
    _alone("--what-if", bool(what_if), {**also, "--ir": ir, "--save": save})
    _alone("--ir", ir is not None, also)
    _alone("--mesh", mesh is not None, {**also, "--ir": ir, "--save": save, "--what-if": what_if})
    pinned = {"--backend": backend != "auto", "--strategy": strategy != "auto", "--max-memory": max_memory}
    _alone("--mesh", mesh is not None, pinned)
    if mesh is None and (shards, transport) != ("auto", "auto"):
        raise SpecError("--shards and --transport belong to --mesh")
    if mesh is not None:
        _mesh(_spec(file, flags), mesh, device, shards, transport, as_json)
        return
    if what_if:
        options = {"device": device, "backend": backend, "strategy": strategy, "max_memory": max_memory}
        _what_if(_spec(file, flags), options, what_if, as_json)
        return
    plan = _plan(file, flags, device, backend, strategy, max_memory)
    if save is not None:
        plan.save(save)
    if ir is not None:
        text = _after(plan, ir)
        _echo_json({"pass": ir, "graph": text}) if as_json else _echo(text)
        return
    with _progress(None, "measuring") if measure else nullcontext():
        shown = plan.explain("json" if as_json else "text", measure=measure)
    more = {**({"graph": str(plan.graph)} if graph else {}), **({"source": plan.source} if source else {})}
    if as_json:
        _echo_json({**shown, **more})
        return
    _echo(shown)
    for text in more.values():
        _echo(f"\n{text}")


def _mesh(spec: AttentionSpec, mesh: str, device: str, shards: str, transport: str, as_json: bool) -> None:
    from attnplan.explain_mesh import facts, render

    found = facts(spec, mesh, device, shards, transport)
    _echo_json(found) if as_json else _echo(render(found))


def _alone(name: str, given: bool, others: dict[str, Any]) -> None:
    """Refuse options that would have no effect."""
    ignored = [other for other, value in others.items() if value]
    if given and ignored:
        raise SpecError(f"{name} prints something else than the page of one plan; leave {ignored[0]} out")


def _what_if(spec: AttentionSpec, options: dict[str, Any], texts: tuple[str, ...], as_json: bool) -> None:
    from attnplan import what_if

    rows = what_if.what_if(spec, options, [change for text in texts for change in what_if.parse_changes(text)])
    if as_json:
        _echo_json(what_if.facts(rows))
    else:
        _echo(what_if.render(rows))


def _after(plan: Any, name: str) -> str:
    graphs = {step.name: str(step.graph) for step in plan.steps}
    if name not in graphs:
        raise SpecError(f"no pass {name!r} ran for {plan!r}{did_you_mean(name, graphs)}")
    return graphs[name]


@main.command()
@click.argument("file", required=False)
@_options(_SPEC_OPTIONS, _PLAN_OPTIONS)
@click.option("--repeat", default=5, show_default=True, type=click.IntRange(1), help="Timed calls after one warm-up.")
@click.option("--backward", is_flag=True, help="Time forward and backward.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random inputs.")
@_JSON
def run(file: str | None, device: str, backend: str, strategy: str, max_memory: str | None, repeat: int,
        backward: bool, seed: int, as_json: bool, **flags: Any) -> None:  # fmt: skip
    """Run a plan on random inputs and compare the time with the prediction."""
    plan = _plan(
        file, {**flags, "training": True if backward else flags["training"]}, device, backend, strategy, max_memory
    )
    times = _timed(plan, repeat, seed, backward)
    measured = statistics.median(times)
    result = {
        "plan": repr(plan),
        "predicted_seconds": plan.predicted.seconds,
        "measured_seconds": measured,
        "fastest_seconds": min(times),
        "slowest_seconds": max(times),
        "repeat": repeat,
        "backward": backward,
    }
    if as_json:
        _echo_json(result)
        return
    basis = getattr(plan.predicted, "basis", "data sheet")
    _echo(
        f"{plan!r}\npredicted  {format_seconds(plan.predicted.seconds)} ({basis})\n"
        f"measured   {format_seconds(measured)}, median of {repeat} "
        f"({format_seconds(min(times))} to {format_seconds(max(times))})\n"
    )


def _timed(plan: Any, repeat: int, seed: int, backward: bool) -> list[float]:
    from attnplan.calls import require_here
    from attnplan.measure import Call

    require_here(plan.target)
    call = Call.of(plan, seed, backward=backward)
    times = []
    with _progress(repeat + 1, "running") as advance:
        for _ in range(repeat + 1):
            times.append(call.timed())
            advance()
    return times[1:]


@main.command()
@click.argument("file", required=False)
@_options(_SPEC_OPTIONS, _PLAN_OPTIONS)
@click.option("--rows", default=64, show_default=True, type=click.IntRange(1), help="Sampled (head, row) pairs.")
@click.option("--seed", default=0, show_default=True, help="Seed of inputs and sample.")
@click.option("--backends", metavar="all|NAMES", help="Cross-validate these: every way to run the spec, all compared.")
@click.option("--catalogue", is_flag=True, help="Cross-validate the specs of attnplan.testing instead of one.")
@click.option("--size", metavar="small|large", help="Of the catalogue; default: large on a GPU.")
@click.option("--repeat", default=1, show_default=True, type=click.IntRange(1), help="Timed calls, cross-validating.")
@click.option("--merge", multiple=True, metavar="RUN", help="Merge what several runs of --catalogue wrote by --output.")
@click.option("--output", metavar="FILE", help="Write the report of --catalogue or --merge as JSON.")
@_JSON
def verify(file: str | None, device: str, backend: str, strategy: str, max_memory: str | None, rows: int, seed: int,
           backends: str | None, catalogue: bool, size: str | None, repeat: int, merge: tuple[str, ...],
           output: str | None, as_json: bool, **flags: Any) -> None:  # fmt: skip
    """Prove the coverage and compare output and gradients with float64. Exit code 1 if anything is wrong.

    With --backends or --catalogue: run every strategy, backend and schedule that accepts the spec, compare each with
    float64, and show every refusal with its reasons. Exit code 3 if nothing ran.
    """
    from attnplan.cli_verify import CrossValidation

    asked = CrossValidation(backends, catalogue, merge, size, output, as_json)
    if asked.wanted(file, flags, pinned=(backend, strategy, max_memory) != ("auto", "auto", None)):
        asked.run(lambda: _spec(file, flags), flags["dtype"], device=device, seed=seed, repeat=repeat)
        return
    plan = _plan(file, flags, device, backend, strategy, max_memory)
    with _progress(None, "verifying"):
        report = plan.verify(rows=rows, seed=seed)
    if as_json:
        checks = [{"name": c.name, "error": c.error, "tolerance": c.tolerance} for c in report.checks]
        _echo_json({"plan": repr(plan), "covered": True, "rows": report.rows, "checks": checks})
        return
    _echo(f"{plan!r}\n{report}\n")


@main.command()
@_JSON
def devices(as_json: bool) -> None:
    """List the device of this machine and the catalogue, with the source of every figure."""
    from attnplan.cost import catalogue, resolve

    here = resolve("auto").device
    rows = [(here, True), *((d, False) for d in catalogue().values())]
    if as_json:
        _echo_json([
            {"name": d.name, "title": d.title, "here": is_here, "tflops": {t: f / 1e12 for t, f in d.flops.items()},
             "bandwidth_gb_s": d.bandwidth / 1e9, "memory_bytes": d.memory, "capability": d.capability,
             "source": d.source}
            for d, is_here in rows
        ])  # fmt: skip
        return
    _echo(f"{'name':<10} {'f32':>7} {'bf16':>7} {'GB/s':>6} {'memory':>8}  what and source\n")
    for device, is_here in rows:
        rates = [device.flops.get(t) for t in ("float32", "bfloat16")]
        cells = [f"{r / 1e12:>7.4g}" if r else f"{'-':>7}" for r in rates]
        here_mark = " (here)" if is_here else ""
        _echo(
            f"{device.name:<10} {' '.join(cells)} {device.bandwidth / 1e9:>6.0f} {format_bytes(device.memory):>8}  "
            f"{device.title}{here_mark}; {device.source}\n"
        )
    _echo("rates in TFLOP/s, dense\n")


@main.command()
@click.argument("file", required=False)
@click.option("--spec", "spec_file", metavar="FILE", help="Say for each backend why it would refuse this spec.")
@_options(_SPEC_OPTIONS)
@click.option("--backend", default="all", show_default=True, metavar="NAME", help="Only what this one says.")
@click.option("--device", default="auto", show_default=True, help="As in explain.")
@_JSON
def backends(file: str | None, spec_file: str | None, backend: str, device: str, as_json: bool, **flags: Any) -> None:
    """List the backends, their versions and schedules; with a spec, what each says to it."""
    from attnplan.backends import registry
    from attnplan.cost import resolve

    if file and spec_file:
        raise SpecError(f"two specs were given, {file} and {spec_file}; leave one out")
    target = resolve(device)
    if backend != "all" and backend not in registry().broken:
        registry().get(backend)
    if file or spec_file or any(v is not None for v in flags.values()):
        _echo_candidates(_spec(file or spec_file, flags), target, backend, as_json)
        return
    rows: list[dict[str, Any]] = [
        {
            "name": b.name,
            "versions": b.versions(),
            "schedules": {s.name: _schedule_row(b, s, target) for s in b.schedules(target.device)},
            "automatic": any(map(b.is_automatic, b.schedules(target.device))),
            "refused": list(b.availability(target)) or _nothing_for(b, target),
        }
        for b in registry().backends.values()
    ]
    rows += [{"name": name, "refused": [why]} for name, why in registry().broken.items()]
    rows = [row for row in rows if backend in ("all", row["name"])]
    if as_json:
        _echo_json(rows)
        return
    for row in rows:
        versions = ", ".join(f"{n} {v or 'not installed'}" for n, v in row.get("versions", {}).items())
        by_name = "   only when asked for by name" if row.get("schedules") and not row["automatic"] else ""
        _echo(f"{row['name']:<10} {versions}{by_name}\n")
        for name, one in row.get("schedules", {}).items():
            where = f"run on {one['tested']}" if one["tested"] else "untested"
            forward, both = map(format_seconds, one["compile_seconds"])
            once = f", compiles once, about {forward}, {both} to train" if any(one["compile_seconds"]) else ""
            only = "" if one["automatic"] or by_name else ", only when asked for by name"
            _echo(f"           {name:<9} {one['title']}   {where}{once}{only}\n")
            for reason in one["refused"]:
                _echo(f"           {'':<9} refused   {reason}\n")
        for reason in row["refused"]:
            _echo(f"           refused   {reason}\n")


def _schedule_row(backend: Any, schedule: Any, target: Any) -> dict[str, Any]:
    known = set(backend.availability(target))
    return {
        "title": schedule.title,
        "tested": schedule.tested,
        "deterministic": schedule.deterministic,
        "automatic": backend.is_automatic(schedule),
        "compile_seconds": list(schedule.compile_seconds),
        "refused": [reason for reason in backend.missing(schedule, target) if reason not in known],
    }


def _nothing_for(backend: Any, target: Any) -> list[str]:
    from attnplan.search import without_schedules

    return [reason for name, reason in without_schedules(target.device).items() if name == backend.name]


def _echo_candidates(spec: AttentionSpec, target: Any, backend: str, as_json: bool) -> None:
    from attnplan.explain_tables import compiles
    from attnplan.search import candidates, without_schedules

    found = [c for c in candidates(spec, target) if backend in ("all", c.backend)]
    rest = {name: why for name, why in without_schedules(target.device).items() if backend in ("all", name)}
    if as_json:
        _echo_json([
            *({"name": c.name, "seconds": c.prediction.seconds if c.prediction else None,
               "compile_seconds": c.prediction.compile_seconds if c.prediction else None, "refused": list(c.reasons)}
              for c in found),
            *({"name": name, "seconds": None, "compile_seconds": None, "refused": [why]} for name, why in rest.items()),
        ])  # fmt: skip
        return
    width = max(map(len, [*(c.name for c in found), *rest]), default=0)
    for c in found:
        says = f"refused   {c.reasons[0]}" if c.reasons else ""
        if c.prediction:
            says = f"{format_seconds(c.prediction.seconds)}{compiles(c.prediction.compile_seconds)}"
        _echo(f"{c.name:<{width}}  {says}\n")
        for reason in c.reasons[1:]:
            _echo(f"{'':<{width}}            {reason}\n")
    for name, why in rest.items():
        _echo(f"{name:<{width}}  refused   {why}\n")
    bases = dict.fromkeys(c.prediction.basis for c in found if c.prediction)
    if bases:
        _echo(f"predictions: {', '.join(bases)}\n")


if __name__ == "__main__":
    main()
