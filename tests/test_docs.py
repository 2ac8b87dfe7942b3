"""The documentation: its code runs, commands print what it shows, links lead somewhere, figures are those of files."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex

import attrs
import pytest
from click.testing import CliRunner

import attnplan
from attnplan import compare, errors, suggest, what_if
from attnplan.cli import main
from tests.conftest import ROOT
from tests.docs_blocks import (
    PAGES,
    RESULTS,
    Block,
    anchors,
    blocks,
    commands,
    figures,
    is_shown,
    links,
    name_of,
    reshown,
)

GENERATED = ("docs/presets.md", "docs/mutants.md")
"""Written by scripts that have tests of their own."""
SMALLER = {"README.md": {"16_384": "2_048"}}
"""What is run in a smaller size than it is shown."""
BEFORE = {
    "docs/compile.md": """
        import torch, attnplan
        spec = attnplan.AttentionSpec(seq_len=64, heads=2, head_dim=8, causal=True, dtype="float32")
        model, tokens = torch.nn.Linear(4, 4), torch.zeros(2, 4)
    """,
    "docs/migration.md": "import torch; x = torch.zeros(1, 512, 768)",
    "docs/backends.md": """
        import torch
        from attnplan import AttentionSpec
    """,
}
"""What a reader of a page has before its first block."""
RUN_LANGUAGES = ("python", "pycon", "console")
"""Blocks that are run, unless a comment before them says why not; ``sh`` needs such a comment."""
OTHER_LANGUAGES = ("toml", "text", "{toctree}", "{eval-rst}")
"""Files, which are written for the commands; output and drawings; what the site is made of."""
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
WRITTEN = [p for p in PAGES if name_of(p) not in GENERATED]
RUN = [p for p in WRITTEN if any(not b.not_run for b in blocks(TEXTS[p], *RUN_LANGUAGES))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that looks like a checkout, to write into."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_code_of_a_page_runs_and_its_commands_print_what_it_shows(page, folder, request):
    """Run all blocks of a page in order, in one namespace and one folder; --update-golden rewrites what is shown."""
    name, text = name_of(page), TEXTS[page]
    space: dict = {"__name__": "__main__"}
    exec(re.sub(r"(?m)^ +", "", BEFORE.get(name, "")), space)
    for block in blocks(text, *RUN_LANGUAGES, "toml"):
        if block.not_run:
            continue
        if block.language == "toml":
            title = re.match(r"# (\S+\.toml)\n", block.text)
            if title:
                (folder / title[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            code = block.text
            for shown, smaller in SMALLER.get(name, {}).items():
                code = code.replace(shown, smaller)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, f"{name}:{text.count(chr(10), 0, block.start) + 1}", "exec"), space)
        elif block.language == "pycon":
            run_doctest(block, name, space)
        else:
            text = run_console(block, text, request.config.getoption("--update-golden"))
    if text != TEXTS[page]:
        page.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_every_block_is_run_or_says_why_not(page):
    for block in blocks(TEXTS[page]):
        first = block.text.strip().split("\n")[0]
        assert block.language in (*RUN_LANGUAGES, *OTHER_LANGUAGES, "sh"), f"{block.language!r} is not run: {first}"
        if block.language == "sh":
            assert block.not_run, f"say before it why no test runs it: {first}"
        if block.language == "text":
            assert not re.search(r"(?m)^(\$ |attnplan |import |from \w+ import )", block.text), f"code as text: {first}"


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_commands_that_are_not_run_exist_with_all_their_options(page):
    for block in blocks(TEXTS[page], "sh", "console"):
        shown = block.text.splitlines() if block.language == "sh" else [c.line for c in commands(block)]
        for line in shown if block.not_run else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["attnplan"]:
                main.commands[words[1]].make_context("attnplan", words[2:])


def run_doctest(block: Block, name: str, space: dict) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    test = doctest.DocTestParser().get_doctest(block.text, space, name, name, 0)
    said = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=flags)
    runner.run(test, out=said.write, clear_globs=False)
    assert not runner.failures, said.getvalue()
    space.update(test.globs)


def run_console(block: Block, text: str, update: bool) -> str:
    """Run the attnplan commands of a block, compare what they print, and return the page, rewritten if asked for."""
    for command in commands(block):
        if not command.line.startswith("attnplan "):
            continue
        words = shlex.split(command.line)[1:]
        done = CliRunner().invoke(main, words)
        assert done.exception is None or isinstance(done.exception, SystemExit), f"{command.line}: {done.exc_info}"
        if update and not is_shown(command.shown, done.output):
            new = reshown(command.shown, done.output)
            assert new is not None, f"{command.line}: update what it shows by hand:\n{done.output}"
            text = text.replace(command.shown, new)
            continue
        assert is_shown(command.shown, done.output), f"{command.line} prints now:\n{done.output}"
    return text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in links(TEXTS[page]):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), link
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{name_of(page)} links to {link}, which is not there"
        assert path.is_relative_to(ROOT), f"{name_of(page)} links out of the repository: {link}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{name_of(page)}: no heading for {link}"


def test_every_page_is_in_the_index():
    index = TEXTS[ROOT / "docs" / "index.md"]
    for page in PAGES[1:]:
        if page.name != "index.md":
            assert f"{page.stem}\n" in index or f"({page.name})" in index, f"{page.name} is on no shelf of the index"


@pytest.mark.parametrize("page", [p for p in PAGES if figures(TEXTS[p])], ids=name_of)
def test_figures_are_those_of_the_files_that_they_are_from(page, request):
    text = TEXTS[page]
    for figure in figures(text):
        assert text.count(figure.shown) > 1, f"{figure.shown!r} is in the comment only"
        if request.config.getoption("--update-golden"):
            text = re.sub(rf"(?<![\d.]){re.escape(figure.shown)}(?![\d.])", figure.computed, text)
            continue
        assert figure.shown == figure.computed, f"{name_of(page)}: {figure.file} says {figure.computed}"
    if text != TEXTS[page]:
        page.write_text(text, encoding="utf-8")


def test_files_of_results_that_are_named_exist():
    for page, text in TEXTS.items():
        for found in re.findall(r"bench/results/([\w-]+\.json)", text):
            assert (RESULTS / found).exists(), f"{name_of(page)} names {found}"


def test_every_error_is_explained():
    text = TEXTS[ROOT / "docs" / "errors.md"]
    public = [n for n in vars(errors) if n.endswith("Error")]
    assert len(public) >= 8
    for name in public:
        assert f"\n## `{name}`\n" in text or name == "AttnPlanError", name
        assert getattr(attnplan, name) is getattr(errors, name)


def key_paths(data, at=""):
    """Iterate over the keys of facts, ``[]`` standing for every element of a list."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield f"{at}.{key}".lstrip(".")
            yield from key_paths(value, f"{at}.{key}")
    elif isinstance(data, list):
        for value in data:
            yield from key_paths(value, f"{at}[]")


def documented(heading):
    """Return the keys in the table below a heading of the page about explain, and what stands above the table."""
    text = TEXTS[ROOT / "docs" / "explain.md"].partition(f"\n{heading}\n")[2]
    text = re.split(r"\n#+ ", text)[0]
    return set(re.findall(r"(?m)^\| `([\w.\[\]]+)` \|", text)), text


def test_the_schema_of_explain_is_documented_key_by_key():
    keys, text = documented("## The JSON schema")
    spec = attnplan.AttentionSpec(
        seq_len=64, heads=2, head_dim=8, causal=True, dtype="float32", pattern="longnet([16, 32], [1, 2])"
    )
    found = attnplan.compile(spec).explain("json", measure=True)
    free = {p for p in key_paths(found) if re.match(r"spec\.(?!title|shape$)|choice\.versions\.", p)}
    assert {p for p in key_paths(found) if p not in free} == keys
    assert f"schema {found['schema']}" in text


@pytest.mark.parametrize("heading", ["### What-if", "### Diff", "### Suggest", "### Rings"])
def test_other_schemas_are_documented_key_by_key(heading):
    spec = attnplan.AttentionSpec(seq_len=512, heads=2, head_dim=64, causal=True, pattern="window(64)")
    if heading == "### What-if":
        found, free = what_if.facts(what_if.what_if(spec, {"device": "h100"}, [{"batch": 2}])), r"rows\[\]\.changes\."
    elif heading == "### Diff":
        plans = attnplan.compile(spec, "h100"), attnplan.compile(attrs.evolve(spec, batch=2), "b200")
        found, free = compare.diff(*plans), r"(spec|ops|candidates)\."
    elif heading == "### Suggest":
        found, free = suggest.facts(suggest.suggest(2048, 2, 64, device="h100")), "nothing"
    else:
        found = attnplan.compile(attrs.evolve(spec, ring_size=4), "h100").explain("json")
        free = r"(spec|device|does|others\[\]|refused\[\])\.|choice$|hops$"
    keys, text = documented(heading)
    assert {p for p in key_paths(found) if not re.match(free, p)} == keys
    assert f"schema {found['schema']}" in text


# ---------------------------------------------------------------------------------------------- the checks themselves


def test_what_is_shown_is_compared():
    assert is_shown("a\nb\n", "a\nb\n\n")
    assert is_shown("torch 2.13.0+cpu\n", "torch 2.11.0\n")
    assert is_shown("a\n...\n", "a\nb\nc\n")
    assert is_shown("a\n...\nd\n", "a\nb\nc\nd\n")
    assert is_shown("a 1 ...\nb\n", "a 1   2 3\nb\n")
    assert not is_shown("a 1 ...\nb\n", "a 2 3\nb\n")
    assert not is_shown("a 1 ...\nb\n", "a 1 3\nc\nb\n")
    assert not is_shown("a\n...\n", "b\na\n")
    assert not is_shown("a\nb\n", "a\nc\n")
    assert not is_shown("a\n", "a\nb\n")
    assert not is_shown("a\n...\nd\n", "a\nb\nd\ne\n")
    assert not is_shown("", "a\n")
    assert reshown("a\n...\n", "x\ny\nz\n") == "x\n...\n"
    assert reshown("a\n", "x \ny\n") == "x\ny\n"
    assert reshown("a\n...\nb\n", "x\ny\n") is None


def test_a_missing_link_and_a_wrong_figure_would_be_seen(tmp_path):
    page = "See [a](no-such.md) and `[b](c)`. It takes 27 ms.\n```\n[d](e)\n```\n"
    page += '<!-- figure: "27 ms" from spine-cpu.json: 1 -->'
    assert list(links(page)) == ["no-such.md"]
    [figure] = figures(page)
    assert figure.computed == "1 ms"
    assert anchors("# The `a` & b: c\n```\n# no\n```\n") == {"the-a--b-c"}
