"""What all pictures share: colours, a figure without global state, and files in PNG or SVG."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnplan.errors import AttnPlanError, SpecError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#1b1f24", "#5b6470", "#c9ced6", "#fffffe"
"""Of text, what is less important, thin lines, and the ground. An inline SVG takes the page's colours instead."""
CATEGORIES = ("#2563eb", "#e8590c", "#0f9d76", "#9c36b5", "#d6336c", "#a07a00")
SUFFIXES = ("png", "svg")
DPI = 160
_RC = {
    "font.size": 9.0,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.parse_math": False,  # names are text, never formulas
    "svg.fonttype": "none",
    "svg.hashsalt": "attnplan",
}


def require_matplotlib() -> None:
    """Raise unless matplotlib is there.

    Raises
    ------
    AttnPlanError
        If it is not; the message has the command that installs it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise AttnPlanError("pictures need matplotlib, which is not installed: pip install 'attnplan[plot]'") from None


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the style of this package, and leave matplotlib's settings as they were.

    Raises
    ------
    AttnPlanError
        If matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_RC), warnings.catch_warnings():  # type: ignore[arg-type]  # its keys are literals
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a title may be in any script
        yield


def colours(count: int) -> list[Any]:
    """Return colours for some branches or candidates: told apart by hue if few, else along one scale."""
    if count <= len(CATEGORIES):
        return list(CATEGORIES[:count])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = colormaps["turbo"]
    return [to_hex(scale(0.06 + 0.88 * i / (count - 1))) for i in range(count)]


def plain(axes: Axes) -> None:
    """Take away the frame's upper and right sides, and draw a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, color=LINE, linewidth=0.5, alpha=0.6)


def shortened(text: str, width: int) -> str:
    """Return the beginning of a text that is longer than ``width`` characters, with three dots.

    Examples
    --------
    >>> shortened("dilated(4096, 2)", 12)
    'dilated(4...'
    """
    return text if len(text) <= width else text[: width - 3] + "..."


def wrapped(text: str, width: int, lines: int) -> list[str]:
    """Return a text in at most some lines, broken between words, the last one shortened if need be.

    Examples
    --------
    >>> wrapped("longnet([1, 2], [1, 1]), causal", 16, lines=2)
    ['longnet([1, 2],', '[1, 1]), causal']
    """
    found = textwrap.wrap(text, width, break_long_words=True)
    return [*found[: lines - 1], shortened(" ".join(found[lines - 1 :]), width)] if len(found) > lines else found


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure to a ``.png`` or ``.svg`` file.

    Raises
    ------
    SpecError
        If the name ends otherwise, or the file cannot be written.
    """
    kind = suffix(path)
    try:
        with styled():
            figure.savefig(path, format=kind, dpi=DPI, facecolor="white", metadata=_metadata(kind))
    except OSError as error:
        raise SpecError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def suffix(path: str | Path) -> str:
    """Return the format that a file's name asks for.

    Raises
    ------
    SpecError
        If it is none of :data:`SUFFIXES`.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in SUFFIXES:
        raise SpecError(f"a picture is written to a .png or .svg file, got {str(path)!r}")
    return kind


def _metadata(kind: str) -> dict[str, Any]:
    return {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}  # equal input, equal bytes


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an ``<svg>`` element for an HTML page.

    Parameters
    ----------
    figure
        The figure.
    name
        A word that is used once in the page: every id of the picture begins with it.
    label
        What the picture shows, for readers who do not see it.

    Notes
    -----
    Ink, lines and ground take the page's ``--ink``, ``--muted``, ``--line`` and ``--page``, so that it is legible on a
    dark page too.
    """
    from html import escape

    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", transparent=True, metadata=_metadata("svg"))
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in ((INK, "--ink"), (MUTED, "--muted"), (LINE, "--line"), (PAPER, "--page")):
        text = text.replace(f": {colour}", f": var({variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
