"""Reads the code blocks, links and figures of the documentation, for the tests that run and check them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from tests.conftest import ROOT

RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```([\w{}-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.DOTALL)
_LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_FIGURE = re.compile(r'<!-- figure: "([^"]+)" from ([\w.-]+): (.+?) -->')
_VERSION = re.compile(r"torch \d[\w.+]*")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@attrs.frozen
class Block:
    """A fenced block: its language, its text, and where the text begins in the page."""

    language: str
    text: str
    start: int
    not_run: str = ""
    """Why no test runs it, as a comment before it says."""


def blocks(page: str, *languages: str) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    found = []
    for m in _FENCE.finditer(page):
        if not languages or m[1] in languages:
            excuse = _NOT_RUN.search(page[: m.start()])
            found.append(Block(m[1], m[2], m.start(2), excuse[1] if excuse else ""))
    return found


@attrs.frozen
class Command:
    """A command of a ``console`` block, and what the page shows that it prints."""

    line: str
    shown: str


def commands(block: Block) -> list[Command]:
    """Return the commands of a ``console`` block; a backslash continues a line."""
    found = []
    for part in re.split(r"(?m)^\$ ", block.text)[1:]:
        head = re.match(r"(?:.*\\\n)*.*\n", part)
        assert head is not None
        found.append(Command(head[0].replace("\\\n", " ").strip(), part[head.end() :]))
    return found


def steady(text: str) -> list[str]:
    """Return the lines of a text without the versions of packages, the widths of columns, and blanks at the end."""
    text = re.sub(r"  +", "  ", _VERSION.sub("torch X.Y", text))
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def is_shown(shown: str, printed: str) -> bool:
    """Return whether a page shows what was printed; three dots are any lines, or the end of one."""
    pattern = ""
    for line in steady(shown):
        head, dots, _ = line.partition(" ...")
        if line == "...":
            pattern += r"(?:.*\n)*?"
        elif dots and line.endswith(" ..."):
            pattern += re.escape(head.rstrip()) + r"(?: .*)?\n"
        else:
            pattern += re.escape(line) + r"\n"
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in steady(printed))) is not None


def reshown(shown: str, printed: str) -> str | None:
    """Return what a page should show instead: as many lines as it did, if it leaves out the end; None if unclear."""
    lines = printed.strip("\n").splitlines()
    if "\n...\n" not in f"\n{shown}":
        return "".join(f"{line.rstrip()}\n" for line in lines)
    kept = shown.splitlines()
    if kept.count("...") != 1 or kept[-1] != "...":
        return None
    return "".join(f"{line.rstrip()}\n" for line in lines[: len(kept) - 1]) + "...\n"


def links(page: str) -> Iterator[str]:
    """Iterate over the targets of links and pictures outside code."""
    prose = re.sub(r"`[^`\n]+`", "", _FENCE.sub("", page))
    for found in _LINK.finditer(prose):
        yield found[1] or found[2]


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub and the site give to the headings of a page."""
    heads = re.findall(r"(?m)^#+ (.+)$", _FENCE.sub("", page))
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "")).strip().lower().replace(" ", "-") for head in heads}


@attrs.frozen
class Figure:
    """A figure that a page takes from a file of results, as it says in a comment."""

    shown: str
    file: str
    expression: str

    @property
    def computed(self) -> str:
        """The figure of the file, written with as many digits as the page shows."""
        data = json.loads((RESULTS / self.file).read_text(encoding="utf-8"))

        def row(**wanted: Any) -> Any:
            rows = data["rows"] if isinstance(data, dict) else data
            return next(r for r in rows if all(r.get(k) == v for k, v in wanted.items()))

        value = eval(self.expression, {"data": data, "row": row})  # an expression of our own pages
        number = re.search(r"[\d,]+(?:\.(\d+))?", self.shown)
        assert number is not None, f"{self.shown!r} shows no number"
        return self.shown.replace(number[0], f"{value:,.{len(number[1] or '')}f}")


def figures(page: str) -> list[Figure]:
    """Return the figures that a page says it takes from files of results."""
    return [Figure(*m.groups()) for m in _FIGURE.finditer(page)]
