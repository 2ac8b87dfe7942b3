"""Commands that set plans side by side, propose patterns, and run passes on printed graphs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from attnplan.cli_common import _JSON, _SPEC_OPTIONS, _echo, _echo_json, _is_plan, _options, _plan, main
from attnplan.errors import SpecError, did_you_mean
from attnplan.spec import AttentionSpec


@main.command("diff")
@click.argument("a")
@click.argument("b", required=False)
@click.option("--device", default="auto", show_default=True, help="To plan A for, if A is a spec.")
@click.option("--device-b", metavar="DEVICE", help="To plan B for; default: that of A. Alone, A is planned for both.")
@_JSON
def diff_plans(a: str, b: str | None, device: str, device_b: str | None, as_json: bool) -> None:
    """Say what changes between A and B: spec files, or plans saved by `explain --save`."""
    from attnplan.compare import diff, render

    if b is None and device_b is None:
        raise SpecError("diff needs a second file, or --device-b to plan the first one for another device")
    found = diff(*(_side(*side) for side in ((a, device), (b or a, device_b or device))))
    if as_json:
        _echo_json(found)
    else:
        _echo(render(found))


def _side(path: str, device: str) -> Any:
    """Return the plan that a file holds, or that of its spec; a saved plan has a device already."""
    return _plan(path, {}, "auto" if _is_plan(path) else device)


@main.command("suggest")
@_options(_SPEC_OPTIONS)
@click.option("--device", default="auto", show_default=True, help="As in explain.")
@click.option("--max-memory", metavar="SIZE", help='Such as "2 GiB": limit beside inputs and output.')
@click.option("--layers", default=12, show_default=True, help="Depth of the stack whose reach is listed.")
@_JSON
def suggest_patterns(device: str, max_memory: str | None, layers: int, as_json: bool, **flags: Any) -> None:
    """List patterns for a length: their reach, pairs, predicted time and peak memory, the fastest first."""
    from attnplan.suggest import facts, render, suggest

    given = {name: value for name, value in flags.items() if value is not None}
    missing = [n for n in ("seq_len", "heads", "head_dim") if n not in given]
    if missing:
        raise SpecError(f"suggest needs --{missing[0].replace('_', '-')}")
    found = suggest(device=device, max_memory=max_memory, layers=layers, **{"dtype": "bfloat16", **given})
    if as_json:
        _echo_json(facts(found))
    else:
        _echo(render(found))


@main.command("opt")
@click.argument("file", default="-")
@click.option("--passes", required=True, metavar="NAMES", help="Comma-separated, such as canonicalize,lattice.")
@click.option("--spec", "spec_file", metavar="FILE", help="Prove the result against this spec, and not the graph read.")
@_JSON
def run_passes(file: str, passes: str, spec_file: str | None, as_json: bool) -> None:
    """Run passes on a printed graph ("-" reads standard input), proving each, and print the result."""
    from attnplan.ir import parse_graph, print_graph
    from attnplan.ir.coverage import coverage, spec_coverage
    from attnplan.passes import PASSES, Pipeline

    names = [name.strip() for name in passes.split(",") if name.strip()]
    for name in names:
        if name not in PASSES:
            raise SpecError(f"unknown pass {name!r}{did_you_mean(name, PASSES)}")
    if not names:
        raise SpecError(f"--passes names no pass; known: {', '.join(sorted(PASSES))}")
    graph = parse_graph(_text(file))
    expected = coverage(graph) if spec_file is None else spec_coverage(AttentionSpec.from_file(spec_file))
    result, steps = Pipeline(tuple(PASSES[name]() for name in names)).run(graph, expected)
    if not as_json:
        _echo(print_graph(result))
        return
    ran = [{"name": s.name, "before": s.before, "after": s.after, "seconds": s.seconds} for s in steps]
    _echo_json({"proved_against": spec_file or "the graph read", "passes": ran, "graph": print_graph(result)})


def _text(file: str) -> str:
    if file == "-":
        return sys.stdin.read()
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the graph file {file!r}: {error}") from None
