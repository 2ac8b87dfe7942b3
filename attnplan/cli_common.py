"""What all commands share: the group, options, exit codes, printing.

Exit codes: 0 success, 1 a plan is wrong, 2 bad input, 3 nothing can run what was asked for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from attnplan.errors import (
    AttnPlanError,
    MemoryBudgetError,
    NoBackendError,
    RingError,
    VerifyError,
)
from attnplan.spec import DTYPES, LAYOUTS, AttentionSpec

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
