from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from attnplan.ir.coverage import spec_coverage
from attnplan.passes import PASSES
from bench.mutants import corpus, judging, pipelines, report, syntax, workers
from bench.mutants.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Forty random mutants, judged; the run fails before the first if the unmutated code does not pass."""
    folder = tmp_path_factory.mktemp("mutants")
    options = ["--sample", "40", "--seed", "1", "--json", str(folder / "run.json"), "--docs", str(folder / "run.md")]
    result = CliRunner().invoke(main, options, catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads((folder / "run.json").read_text()), (folder / "run.md").read_text(), result.output


def test_the_proof_catches_a_sample_of_mutants(sample):
    figures = sample[0]["summary"]
    assert figures["mutants"] == 40
    assert figures["caught"] >= 10
    assert figures["rate"] >= 0.95
    assert figures["timeout"] == 0


def test_the_report_states_the_figures(sample):
    data, page, output = sample
    figures = data["summary"]
    assert f"**{figures['caught']} of {figures['caught'] + figures['survivor']}**" in page
    assert f"{figures['rate']:.1%}" in page
    assert f"{figures['survivor']}\n" in output


def test_a_mutant_that_takes_too_long_is_given_up():
    (row,) = workers.run(syntax.mutants()[:1], jobs=1, limit=0.0)
    assert row["verdict"] == "timeout"


def test_the_committed_page_is_that_of_the_committed_run():
    data = json.loads((ROOT / "bench/results/mutants.json").read_text())
    assert report.summary(data["mutants"]) == data["summary"]
    assert data["summary"]["rate"] >= 0.95
    assert report.render(data) == (ROOT / "docs/mutants.md").read_text()
    assert "not yet explained" not in report.render(data)


# They choose how rows are fetched, launched, joined and looped over; their own tests hold mutations of them.
OTHER = {f"attnplan.passes.{name}" for name in ("batch_branches", "chunk", "pull_merge", "recompute", "views")}


def test_every_pass_that_changes_what_is_computed_is_mutated():
    assert {p.__module__ for p in PASSES.values()} - OTHER <= set(pipelines.TARGETS)


def texts(source):
    """Return every mutation of a function."""
    tree = ast.parse(source)
    function = tree.body[0]
    return {ast.unparse(syntax.replaced(tree, old, new)) for old, _, new in syntax.changes(function)}


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("return x + 1", ["x + 2", "x + 0", "x - 1"]),
        ("return x < y", ["x <= y"]),
        ("return x in y", ["x not in y"]),
        ("return x // y % x", ["x // y // x", "x % y % x"]),
        ("return -x", ["x"]),
        ("return not x and y", ["x and y", "not x or y", "not x", "y"]),
        ("return x[0]", ["x[1]", "x[-1]"]),
        ("return (x, 2, y)", ["(2, x, y)", "(x, y, 2)", "(x, 2)", "(2, y)", "(x, y)"]),
        ("return min(x, y)", ["max(x, y)", "min(y, x)", "min(x)", "min(y)"]),
        ("return x if y else 3", ["x if not y else 3"]),
        ("return f(x, length=y)", ["f(x)", "f(length=y)", "f(x, rate=y)"]),
        ("return [z for z in x if z]", ["[z for z in x]"]),
        ("return q - k", ["k - k", "q - q"]),
        ("return x.queries", ["x.keys"]),
    ],
)
def test_mutations_of_a_statement(statement, expected):
    found = texts(f"def g(x, y, q, k):\n    {statement}")
    for text in expected:
        assert ast.unparse(ast.parse(f"def g(x, y, q, k):\n    return {text}")) in found
    assert ast.unparse(ast.parse("def g(x, y, q, k):\n    pass")) in found


def test_docstrings_annotations_imports_and_messages_stay():
    source = 'def g(x: A[0]) -> B[0]:\n    """One, 1."""\n    from a import b\n    y: C[1] = x\n    raise E(f"{x} < 1")'
    assert texts(source) == {ast.unparse(ast.parse(source.replace("y: C[1] = x", "pass")))}


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (["same", "refused", "wrong"], "caught"),
        (["same", "wrong", "crash"], "survivor"),
        (["broken", "equal"], "survivor"),
        (["same", "crash", "equal"], "crash"),
        (["same", "unknown"], "same meaning"),
        (["same", "same"], "identical"),
    ],
)
def test_a_verdict_is_that_of_the_weightiest_outcome(outcomes, verdict):
    assert judging.judge(("spec", "usual", outcome, "") for outcome in outcomes)["verdict"] == verdict


def test_the_unmutated_module_loaded_as_a_mutant_makes_the_same_graphs():
    compiler = judging.Compiler.load(pipelines.TARGETS[-1], ast.unparse(syntax.parsed(pipelines.TARGETS[-1])))
    plain = judging.Compiler.load()
    for name in ("longnet-gqa", "grouped-mean", "million-longnet"):
        spec = corpus.CORPUS[name]
        expected = spec_coverage(spec)
        assert compiler.run(spec, "usual", expected) == plain.run(spec, "usual", expected)
