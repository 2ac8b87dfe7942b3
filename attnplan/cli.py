"""The command line: ``attnplan explain | run | verify | devices | backends``.

Exit codes: 0 success, 1 a plan is wrong, 2 bad input, 3 nothing can run what was asked for.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from attnplan.errors import AttnPlanError, MemoryBudgetError, NoBackendError, RingError, VerifyError
from attnplan.spec import DTYPES, LAYOUTS, AttentionSpec
from attnplan.units import format_bytes, format_seconds

F = TypeVar("F", bound=Callable[..., Any])

EXIT_WRONG, EXIT_BAD_INPUT, EXIT_CANNOT = 1, 2, 3
_EXITS: tuple[tuple[tuple[type[AttnPlanError], ...], int], ...] = (
    ((VerifyError,), EXIT_WRONG),
    ((NoBackendError, MemoryBudgetError, RingError), EXIT_CANNOT),
    ((AttnPlanError,), EXIT_BAD_INPUT),
)

_SPEC_OPTIONS = (
    click.option("--seq-len", type=int, metavar="S", help="Query rows."),
    click.option("--heads", type=int, metavar="H", help="Query heads."),
    click.option("--head-dim", type=int, metavar="D", help="Features of q and k."),
    click.option("--pattern", metavar="EXPR", help='Such as "window(512) | sinks(4)" or "longnet([2048], [1])".'),
    click.option("--causal/--no-causal", default=None, help="Only keys at or before the query's position."),
    click.option("--kv-len", type=int, metavar="K", help="Keys; default: the queries."),
    click.option("--kv-heads", type=int, metavar="H", help="Key/value heads; default: the query heads."),
    click.option("--value-dim", type=int, metavar="D", help="Features of v; default: those of q."),
    click.option("--batch", type=int, metavar="B", help="Batch size to price and run."),
    click.option("--dtype", metavar="|".join(DTYPES), help="Of q, k, v and the output."),
    click.option("--layout", metavar="|".join(LAYOUTS), help="Order of the dimensions."),
    click.option("--scale", type=float, help="Factor on q k^T; default: 1/sqrt(D)."),
    click.option("--softcap", type=float, help="Scores become softcap * tanh(s / softcap)."),
    click.option("--training/--no-training", default=None, help="Price the backward pass too."),
)
_PLAN_OPTIONS = (
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, or a name of `devices`."),
    click.option("--backend", default="auto", show_default=True, help="Pin a backend."),
    click.option("--strategy", default="auto", show_default=True, help="Pin a strategy."),
    click.option("--max-memory", metavar="SIZE", help='Such as "2 GiB": limit beside inputs and output.'),
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")


def _options(*groups: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed([o for group in groups for o in group]):
            command = option(command)
        return command

    return decorate


def _spec(file: str | None, flags: dict[str, Any]) -> AttentionSpec:
    """Read the spec file, if any, and let flags override it."""
    given = {name: value for name, value in flags.items() if value is not None}
    if file is None:
        return AttentionSpec.from_dict({"dtype": "bfloat16", **given})
    text = sys.stdin.read() if file == "-" else None
    spec = AttentionSpec.from_file(file) if text is None else AttentionSpec.from_text(text, name="standard input")
    return AttentionSpec.from_dict({**spec.to_dict(), **given}) if given else spec


def _compile(spec: AttentionSpec, device: str, backend: str, strategy: str, max_memory: str | None) -> Any:
    from attnplan.api import compile  # noqa: A004

    return compile(spec, device, backend, strategy, max_memory)


class _Group(click.Group):
    """Turns our errors into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AttnPlanError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            ctx.exit(next(code for kinds, code in _EXITS if isinstance(error, kinds)))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="attnplan")
def main() -> None:
    """Plan, explain, run and verify attention.

    Specs are TOML or JSON files ("-" reads TOML from standard input), or flags; flags override a file.
    """


@main.command()
@click.argument("file", required=False)
@_options(_SPEC_OPTIONS, _PLAN_OPTIONS)
@click.option("--source", is_flag=True, help="Print the emitted program too.")
@click.option("--graph", "graph", is_flag=True, help="Print the graph too.")
@_JSON
def explain(file: str | None, device: str, backend: str, strategy: str, max_memory: str | None, source: bool,
            graph: bool, as_json: bool, **flags: Any) -> None:  # fmt: skip
    """Say what would run, why, and what it costs. Needs no torch."""
    plan = _compile(_spec(file, flags), device, backend, strategy, max_memory)
    if as_json:
        facts = plan.explain(format="json")
        if graph:
            facts["graph"] = str(plan.graph)
        if source:
            facts["source"] = plan.source
        _echo_json(facts)
        return
    _echo(plan.explain())
    if graph:
        _echo(f"\n{plan.graph}")
    if source:
        _echo(f"\n{plan.source}")


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
    spec = _spec(file, {**flags, "training": True if backward else flags["training"]})
    plan = _compile(spec, device, backend, strategy, max_memory)
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
    _echo(
        f"{plan!r}\npredicted  {format_seconds(plan.predicted.seconds)} (data sheet)\n"
        f"measured   {format_seconds(measured)}, median of {repeat} "
        f"({format_seconds(min(times))} to {format_seconds(max(times))})\n"
    )


def _timed(plan: Any, repeat: int, seed: int, backward: bool) -> list[float]:
    from attnplan.calls import require_here

    require_here(plan.target)
    import torch

    from attnplan.verify import random_inputs, random_operands

    generator = torch.Generator().manual_seed(seed)
    device = plan.target.torch_device
    q, k, v = (x.to(device).requires_grad_(backward) for x in random_inputs(plan.spec, generator))
    operands = {name: x.to(device) for name, x in random_operands(plan.spec, generator).items()}
    times = []
    with _progress(repeat + 1, "running") as advance:
        for _ in range(repeat + 1):
            start = time.perf_counter()
            out = plan(q, k, v, **operands)
            if backward:
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            if q.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            advance()
    return times[1:]


@main.command()
@click.argument("file", required=False)
@_options(_SPEC_OPTIONS, _PLAN_OPTIONS)
@click.option("--rows", default=64, show_default=True, type=click.IntRange(1), help="Sampled (head, row) pairs.")
@click.option("--seed", default=0, show_default=True, help="Seed of inputs and sample.")
@_JSON
def verify(file: str | None, device: str, backend: str, strategy: str, max_memory: str | None, rows: int,
           seed: int, as_json: bool, **flags: Any) -> None:  # fmt: skip
    """Prove the coverage and compare output and gradients with float64. Exit code 1 if anything is wrong."""
    plan = _compile(_spec(file, flags), device, backend, strategy, max_memory)
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
@click.option("--device", default="auto", show_default=True, help="As in explain.")
@_JSON
def backends(file: str | None, spec_file: str | None, device: str, as_json: bool, **flags: Any) -> None:
    """List the backends, their versions and schedules; with a spec, what each says to it."""
    from attnplan.backends import registry
    from attnplan.cost import resolve

    target = resolve(device)
    if file or spec_file or any(v is not None for v in flags.values()):
        _echo_candidates(_spec(file or spec_file, flags), target, as_json)
        return
    rows: list[dict[str, Any]] = [
        {
            "name": b.name,
            "versions": b.versions(),
            "schedules": {s.name: s.title for s in b.schedules(target.device)},
            "automatic": b.automatic,
            "refused": list(b.availability(target)),
        }
        for b in registry().backends.values()
    ]
    rows += [{"name": name, "refused": [why]} for name, why in registry().broken.items()]
    if as_json:
        _echo_json(rows)
        return
    for row in rows:
        versions = ", ".join(f"{n} {v or 'not installed'}" for n, v in row.get("versions", {}).items())
        by_name = "" if row.get("automatic", True) else "   only when asked for by name"
        _echo(f"{row['name']:<10} {versions}{by_name}\n")
        for name, what in row.get("schedules", {}).items():
            _echo(f"           {name:<9} {what}\n")
        for reason in row["refused"]:
            _echo(f"           refused   {reason}\n")


def _echo_candidates(spec: AttentionSpec, target: Any, as_json: bool) -> None:
    from attnplan.search import candidates

    found = candidates(spec, target)
    if as_json:
        _echo_json([
            {"name": c.name, "seconds": c.prediction.seconds if c.prediction else None, "refused": list(c.reasons)}
            for c in found
        ])  # fmt: skip
        return
    width = max(len(c.name) for c in found)
    for c in found:
        says = format_seconds(c.prediction.seconds) if c.prediction else f"refused   {c.reasons[0]}"
        _echo(f"{c.name:<{width}}  {says}\n")
        for reason in c.reasons[1:]:
            _echo(f"{'':<{width}}            {reason}\n")


def _echo_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))


_STYLES = {
    r"(?m)^(choice|predicted|measured|coverage|does|mask|device|others|numbers)\b": "bold",
    r"\bok\b": "green",
    r"\b(refused|WRONG)\b": "red",
    r"[░▒▓█·]+": "cyan",
    r"(?m)^  op .*$": "dim",
    r"\(data sheet\)": "dim",
}


def _echo(text: str) -> None:
    """Print text: coloured on a terminal, plain in a pipe."""
    if not sys.stdout.isatty():
        click.echo(text, nl=False)
        return
    from rich.console import Console
    from rich.text import Text

    styled = Text(text)
    for pattern, style in _STYLES.items():
        styled.highlight_regex(pattern, style)
    Console(highlight=False, soft_wrap=True).print(styled, end="")


@contextmanager
def _progress(total: int | None, what: str) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr while something long runs, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


if __name__ == "__main__":
    main()
