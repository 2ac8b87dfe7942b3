"""Commands that draw: pictures of a plan, and the report that holds them all."""

from __future__ import annotations

from collections.abc import Callable
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnplan.cli_common import (
    _JSON,
    _PLAN_OPTIONS,
    _SPEC_OPTIONS,
    _compile,
    _echo,
    _echo_json,
    _options,
    _plan,
    _spec,
    main,
)
from attnplan.cost import resolve
from attnplan.errors import SpecError
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
@click.option("--mesh", metavar="NODESxRANKS", help="ring: such as 8 or 2x8; default: the spec's ring_size.")
@click.option("--shards", default="auto", show_default=True, help="ring: contiguous, zigzag or striped.")
@click.option("--transport", default="auto", show_default=True, help="ring: how rows travel.")
@click.option("--lengths", metavar="N,N,...", help="length: such as 1k,64k,1m; default: around the spec's own.")
@_options(_SPEC_OPTIONS, _PLAN_OPTIONS)
@_JSON
def draw_picture(file: str | None, output: str, what: str, device: str, backend: str, strategy: str,
                 max_memory: str | None, as_json: bool, **given: Any) -> None:  # fmt: skip
    """Draw the mask, the roofline of a plan, predicted time against length, the graph, or a ring. Needs matplotlib."""
    from attnplan import pictures

    pictures.suffix(output)
    pictures.require_matplotlib()
    region = {name: given.pop(name) for name in _OPTIONS}
    pins = {"device": device, "backend": backend, "strategy": strategy, "max-memory": max_memory}
    _check_options(what, {**region, **pins})
    spec = _spec(file, given)
    figure, facts = _picture(what, spec, region, device, lambda: _compile(spec, device, backend, strategy, max_memory))
    pictures.save(figure, output)
    if as_json:
        _echo_json({"what": what, "file": output, "bytes": Path(output).stat().st_size, **facts()})
    else:
        _echo(f"wrote {output}\n")


def _picture(
    what: str, spec: AttentionSpec, region: dict[str, Any], device: str, plan: Callable[[], Any]
) -> tuple[Figure, Callable[[], dict[str, Any]]]:
    """Return a picture, and what gives the facts that it shows."""
    from attnplan import pictures as p

    if what == "mask":
        part = _region(spec, region)
        return p.mask_figure(spec, **part), lambda: p.mask_facts(spec, **part)
    if what == "length":
        wanted = None if region["lengths"] is None else [parse_count(n) for n in region["lengths"].split(",")]
        target = resolve(device)
        return p.length_figure(spec, target, wanted), lambda: p.length_facts(spec, target, wanted)
    if what == "ring":
        if region["mesh"] is None and spec.ring_size == 1:
            raise SpecError("--what ring needs --mesh, such as --mesh 8, or a spec with ring_size above 1")
        ring = (spec, resolve(device), region["mesh"] or spec.ring_size, region["shards"], region["transport"])
        return p.ring_figure(*ring), lambda: p.ring_facts(*ring)
    made = plan()
    if what == "roofline":
        return p.roofline_figure(made), lambda: p.roofline_facts(made)
    return p.graph_figure(made.graph, p.heading(made)), lambda: p.graph_facts(made)


_OPTIONS = ("head", "rows", "keys", "zoom", "tile", "lengths", "mesh", "shards", "transport")
_BELONGS = {
    "lengths": ("length",),
    "device": ("roofline", "length", "graph", "ring"),
    **dict.fromkeys(("mesh", "shards", "transport"), ("ring",)),
    **dict.fromkeys(("backend", "strategy", "max-memory"), ("roofline", "graph")),
}


def _check_options(what: str, given: dict[str, Any]) -> None:
    """Refuse options that would have no effect."""
    for name, value in given.items():
        belongs = _BELONGS.get(name, ("mask",))
        if value not in (None, "auto") and what not in belongs:
            raise SpecError(f"--{name} belongs to --what {' or '.join(belongs)}, not to --what {what}")


def _region(spec: AttentionSpec, region: dict[str, Any]) -> dict[str, Any]:
    """Return head, rows, keys and tile as pictures take them."""
    head: str = region["head"]
    rows, keys = (_range(n, region[n]) for n in ("rows", "keys"))
    shape = spec.shape
    if region["zoom"] is not None:
        if rows or keys:
            raise SpecError("--zoom and --rows or --keys both say which region; give one of them")
        rows, keys = (_middle(n, region["zoom"]) for n in (shape.seq_len, shape.kv_len))
    elif rows and not keys:
        keys = (floor(rows[0] * shape.kv_len / shape.seq_len), -(-rows[1] * shape.kv_len // shape.seq_len))
    return {"head": int(head) if head.isdecimal() else head, "rows": rows, "keys": keys, "tile": region["tile"]}


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
@_JSON
def write_report(file: str | None, output: str, device: str, backend: str, strategy: str, max_memory: str | None,
                 as_json: bool, **flags: Any) -> None:  # fmt: skip
    """Write everything about a plan into one HTML file that needs nothing else. Needs matplotlib."""
    from attnplan.report import report

    plan = _plan(file, flags, device, backend, strategy, max_memory)
    page = report(plan)
    try:
        Path(output).write_text(page, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot write {output!r}: {error.strerror or error}") from None
    size = len(page.encode())
    if as_json:
        _echo_json({"file": output, "bytes": size, "plan": repr(plan)})
    else:
        _echo(f"wrote {output}, {format_bytes(size)}\n")
