"""What all commands share: the group, options, exit codes, printing.

Exit codes: 0 success, 1 a plan is wrong, 2 bad input, 3 nothing can run what was asked for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from attnplan.errors import (
    AttnPlanError,
    MemoryBudgetError,
    NoBackendError,
    RingError,
    SpecError,
    VerifyError,
)
from attnplan.spec import DTYPES, LAYOUTS, AttentionSpec
from attnplan.units import parse_count

F = TypeVar("F", bound=Callable[..., Any])

EXIT_WRONG, EXIT_BAD_INPUT, EXIT_CANNOT = 1, 2, 3
_EXITS: tuple[tuple[tuple[type[AttnPlanError], ...], int], ...] = (
    ((VerifyError,), EXIT_WRONG),
    ((NoBackendError, MemoryBudgetError, RingError), EXIT_CANNOT),
    ((AttnPlanError,), EXIT_BAD_INPUT),
)


def _count(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Read a number of rows as people write it: 65536, 64k, 1m."""
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        return parse_count(value)


_SPEC_OPTIONS = (
    click.option("--seq-len", callback=_count, metavar="S", help="Query rows, such as 65536 or 64k."),
    click.option("--heads", type=int, metavar="H", help="Query heads."),
    click.option("--head-dim", type=int, metavar="D", help="Features of q and k."),
    click.option("--pattern", metavar="EXPR", help='Such as "window(512) | sinks(4)" or "longnet([2048], [1])".'),
    click.option("--causal/--no-causal", default=None, help="Only keys at or before the query's position."),
    click.option("--kv-len", callback=_count, metavar="K", help="Keys; default: the queries."),
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
    if _is_plan(file):
        raise SpecError(f"{file} is a saved plan, and this needs a spec: name the spec's file")
    text = sys.stdin.read() if file == "-" else None
    spec = AttentionSpec.from_file(file) if text is None else AttentionSpec.from_text(text, name="standard input")
    return AttentionSpec.from_dict({**spec.to_dict(), **given}) if given else spec


def _plan(
    file: str | None,
    flags: dict[str, Any],
    device: str = "auto",
    backend: str = "auto",
    strategy: str = "auto",
    max_memory: str | None = None,
) -> Any:
    """Return the plan that a file holds, or the plan of the spec that a file and flags say.

    A plan of other versions is taken as it is.
    """
    if file is None or not _is_plan(file):
        return _compile(_spec(file, flags), device, backend, strategy, max_memory)
    pins = {"device": device, "backend": backend, "strategy": strategy, "max_memory": max_memory}
    given = [n for n, value in {**flags, **pins}.items() if value not in (None, "auto")]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise SpecError(
            f"{file} is a saved plan, for which {option} has no effect: leave it out, or name the spec's file"
        )
    from attnplan.api import load

    return load(file, stale="keep")


def _is_plan(path: str) -> bool:
    """Return whether a file is a saved plan: anything else is a spec, or what its own reader says is wrong."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "attnplan_plan" in data


def _compile(spec: AttentionSpec, device: str, backend: str, strategy: str, max_memory: str | None) -> Any:
    from attnplan.api import compile  # noqa: A004

    return compile(spec, device, backend, strategy, max_memory)


_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Group(click.Group):
    """Turns our errors into one line on stderr and an exit code."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        cmd.context_settings = {**_HELP, **cmd.context_settings}  # whoever shows a command's help without the group
        super().add_command(cmd, name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AttnPlanError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            ctx.exit(next(code for kinds, code in _EXITS if isinstance(error, kinds)))


@click.group(cls=_Group, context_settings=_HELP)
@click.version_option(package_name="attnplan")
def main() -> None:
    """Plan, explain, run and verify attention.

    Specs are TOML or JSON files ("-" reads TOML from standard input), or flags; flags override a file.
    """


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
