"""Commands that draw: pictures of a plan, and the report that holds them all."""

from __future__ import annotations

from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnplan.cli_common import _PLAN_OPTIONS, _SPEC_OPTIONS, _compile, _echo, _options, _spec, main
from attnplan.cost import resolve
from attnplan.errors import RingError, SpecError
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes, parse_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHAT = ("mask", "roofline", "length", "graph", "ring")


@main.command("draw")
@click.argument("file", required=False)
@click.option("-o", "--output", required=True, metavar="FILE", help="A .png or .svg file.")
@click.option("--what", type=click.Choice(WHAT), default="mask", show_default=True, help="What to draw.")
@click.option("--head", default="auto", show_default=True, metavar="N|auto|all", help="mask: which heads.")
@click.option("--rows", metavar="A:B", help="mask: query rows A to B, such as 0:4k.")
@click.option("--keys", metavar="C:D", help="mask: keys C to D; default: the same part as of the rows.")
@click.option("--zoom", type=click.FloatRange(1), help="mask: the middle 1/ZOOM of rows and keys.")
@click.option(
    "--tile", type=click.IntRange(1), help="mask: queries and keys of a cell; default: up to 512 x 512 cells."
)
@click.option("--lengths", metavar="N,N,...", help="length: such as 1k,64k,1m; default: around the spec's own.")
@_options(_SPEC_OPTIONS, _PLAN_OPTIONS)
def draw_picture(file: str | None, output: str, what: str, device: str, backend: str, strategy: str,
                 max_memory: str | None, **given: Any) -> None:  # fmt: skip
    """Draw the mask, the roofline of a plan, predicted time against length, or the graph. Needs matplotlib."""
    from attnplan.pictures import (
        graph_figure,
        heading,
        length_figure,
        require_matplotlib,
        roofline_figure,
        save,
        suffix,
    )

    if what == "ring":
        raise RingError("--what ring draws who sends what to whom, and ring execution is not in this version")
    suffix(output)
    require_matplotlib()
    region = {name: given.pop(name) for name in ("head", "rows", "keys", "zoom", "tile", "lengths")}
    pins = {"backend": backend, "strategy": strategy, "max-memory": max_memory}
    _check_options(what, {**region, **pins})
    spec = _spec(file, given)
    if what == "mask":
        save(_mask(spec, region), output)
    elif what == "length":
        wanted = None if region["lengths"] is None else [parse_count(n) for n in region["lengths"].split(",")]
        save(length_figure(spec, resolve(device), wanted), output)
    else:
        plan = _compile(spec, device, backend, strategy, max_memory)
        save(roofline_figure(plan) if what == "roofline" else graph_figure(plan.graph, heading(plan)), output)
    _echo(f"wrote {output}\n")


_BELONGS = {"lengths": ("length",), **dict.fromkeys(("backend", "strategy", "max-memory"), ("roofline", "graph"))}


def _check_options(what: str, given: dict[str, Any]) -> None:
    """Refuse options that would have no effect."""
    for name, value in given.items():
        belongs = _BELONGS.get(name, ("mask",))
        if value not in (None, "auto") and what not in belongs:
            raise SpecError(f"--{name} belongs to --what {' or '.join(belongs)}, not to --what {what}")


def _mask(spec: AttentionSpec, region: dict[str, Any]) -> Figure:
    from attnplan.pictures import mask_figure

    head: str = region["head"]
    rows, keys = (_range(n, region[n]) for n in ("rows", "keys"))
    shape = spec.shape
    if region["zoom"] is not None:
        if rows or keys:
            raise SpecError("--zoom and --rows or --keys both say which region; give one of them")
        rows, keys = (_middle(n, region["zoom"]) for n in (shape.seq_len, shape.kv_len))
    elif rows and not keys:
        keys = (floor(rows[0] * shape.kv_len / shape.seq_len), -(-rows[1] * shape.kv_len // shape.seq_len))
    return mask_figure(spec, int(head) if head.isdecimal() else head, rows, keys, region["tile"])


def _range(name: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not colon:
        raise SpecError(f"--{name} is a range such as 0:4k, got {text!r}")
    return (0 if start.strip() in ("", "0") else parse_count(start)), parse_count(stop)


def _middle(length: int, zoom: float) -> tuple[int, int]:
    """Return the middle part of a range, at least one long.

    Examples
    --------
    >>> _middle(1000, 10), _middle(1, 4)
    ((450, 550), (0, 1))
    """
    part = max(1, round(length / zoom))
    start = (length - part) // 2
    return start, start + part


@main.command("report")
@click.argument("file", required=False)
@click.option("-o", "--output", required=True, metavar="FILE", help="The HTML file to write.")
@_options(_SPEC_OPTIONS, _PLAN_OPTIONS)
def write_report(file: str | None, output: str, device: str, backend: str, strategy: str, max_memory: str | None,
                 **flags: Any) -> None:  # fmt: skip
    """Write everything about a plan into one HTML file that needs nothing else. Needs matplotlib."""
    from attnplan.report import report

    plan = _compile(_spec(file, flags), device, backend, strategy, max_memory)
    page = report(plan)
    try:
        Path(output).write_text(page, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot write {output!r}: {error.strerror or error}") from None
    _echo(f"wrote {output}, {format_bytes(len(page.encode()))}\n")
