"""HTML that holds everything itself: no scripts, no outside resources, and every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --muted: #5b6470; --line: #d5d9df; --page: #ffffff; --box: #f5f6f8;
  --accent: #2563eb; --bad: #b42318 }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --muted: #a3adb9; --line: #3a424d; --page: #14171b;
  --box: #1d2127; --accent: #7aa5ff; --bad: #ff9a8f } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.25rem; line-height: 1.35; margin: .5rem 0 .25rem }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line) }
p { margin: .4rem 0 } .muted { color: var(--muted) } .bad { color: var(--bad) }
code, pre { font: .82rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
pre { margin: .5rem 0; padding: .75rem; background: var(--box); border-radius: .4rem; overflow-x: auto;
  overflow-wrap: normal }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .6rem; margin: .8rem 0 }
.card { background: var(--box); border-radius: .5rem; padding: .6rem .75rem }
.card b { display: block; font-size: 1.15rem } .card span { color: var(--muted); font-size: .82rem }
.wide { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .84rem; min-width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal }
th { color: var(--muted); font-weight: 600; white-space: nowrap } td { min-width: 3.5rem }
.n { text-align: right; white-space: nowrap } .w { white-space: nowrap }
.reasons { min-width: 16rem } .chosen td { font-weight: 600 }
.bar { display: inline-block; width: 6rem; height: .6rem; background: var(--box); border-radius: .2rem;
  vertical-align: middle }
.bar i { display: block; height: 100%; background: var(--accent); border-radius: .2rem }
details { margin: .4rem 0; border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .75rem }
summary { cursor: pointer; font-weight: 600 }
figure { margin: .75rem 0; overflow-x: auto } figure svg { max-width: 100%; height: auto; display: block }
figure.scroll svg { max-width: none } figure.roofline svg, figure.length svg { min-width: 40rem }
dl { margin: .5rem 0 } dt { font-size: .88rem; margin-top: .5rem } dd { margin: 0 0 0 1rem; font-size: .84rem;
  color: var(--bad) }
footer { margin: 2.5rem 0 1rem; color: var(--muted); font-size: .82rem }
@media print { details { break-inside: avoid } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page: nothing from elsewhere, no script."""


class Html(str):
    """Text that is HTML already. Everything else is escaped where it is used."""

    __slots__ = ()


def text(value: object) -> Html:
    """Escape a value, unless it is HTML already.

    Examples
    --------
    >>> text("a < b"), text(Html("<b>a</b>"))
    ('a &lt; b', '<b>a</b>')
    """
    return value if isinstance(value, Html) else Html(escape(str(value), quote=True))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Join values, each escaped."""
    return Html(between.join(text(p) for p in parts))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """Return an element; ``class_`` stands for ``class``.

    Examples
    --------
    >>> tag("p", "1 < 2", class_="muted")
    '<p class="muted">1 &lt; 2</p>'
    """
    given = "".join(f' {k.rstrip("_")}="{text(v)}"' for k, v in attributes.items())
    return Html(f"<{name}{given}>{join(content)}</{name}>")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], kinds: str, chosen: int | None = None) -> Html:
    """Return a table that scrolls sideways where it does not fit.

    Parameters
    ----------
    head
        The titles of the columns.
    rows
        The cells.
    kinds
        A letter for each column: ``n`` numbers, to the right; ``w`` words that are not broken; ``-`` text.
    chosen
        Number of a row to set off.
    """
    names = {"n": {"class_": "n"}, "w": {"class_": "w"}, "-": {}}
    first = tag("tr", *(tag("th", h, scope="col", **names[k]) for h, k in zip(head, kinds, strict=True)))
    body = [
        tag("tr", *(tag("td", c, **names[k]) for c, k in zip(row, kinds, strict=True)),
            **({"class_": "chosen"} if i == chosen else {}))
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return tag("div", tag("table", tag("thead", first), tag("tbody", *body)), class_="wide", tabindex="0")


def bar(share: float) -> Html:
    """Return a bar that is filled as far as ``share``, from 0 to 1."""
    width = f"width: {100 * min(max(share, 0.0), 1.0):.1f}%"
    return tag("span", tag("i", style=width), class_="bar")


def folded(summary: object, *content: object) -> Html:
    """Return something that is shown when its summary is clicked; without scripts."""
    return tag("details", tag("summary", summary), *content)


def page(title: str, *content: object) -> str:
    """Return a whole page."""
    head = join([
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'),
        Html('<link rel="icon" href="data:,">'),  # or a browser asks its server for one
        tag("title", title),
        tag("style", Html(STYLE)),
    ])  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{join(content, chr(10))}\n</body>\n</html>\n'
    )
