"""A backend of another package: found through its entry point, validated, and caught where it is wrong."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib

import pytest
import torch

import attnplan
from attnplan.backends import registry
from attnplan.errors import VerifyError
from attnplan.testing import (
    Case,
    catalogue,
    cross_validate,
)
from tests.conftest import ROOT
from tests.faulty import SPEC

torch.set_num_threads(1)

EXAMPLE = ROOT / "examples" / "third_party_backend"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install the example as pip would: its package on the path, and the metadata of its pyproject.toml."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"banded_attention-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in points.items())
             for group, points in project["entry-points"].items()]  # fmt: skip
    (info / "entry_points.txt").write_text("\n".join(lines))
    for path in (EXAMPLE, tmp_path):
        monkeypatch.syspath_prepend(str(path))
    registry.cache_clear()
    attnplan.cache_clear()
    yield tmp_path
    registry.cache_clear()
    attnplan.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] == "banded_attention"]:
        del sys.modules[name]


def test_the_example_is_found_through_its_entry_point_and_is_right(installed):
    assert list(registry().backends)[-1] == "banded"
    ran = [name for name, case in catalogue().items() if cross_validate(case, "cpu", ["banded"]).ran]
    assert set(ran) >= {"dense", "causal", "window", "window, causal", "window ahead", "grouped queries", "open length",
                        "more queries than keys, causal", "narrow values", "causal, heads last"}  # fmt: skip
    for name in ran:
        cross_validate(catalogue(dtype="float64")[name], "cpu", ["banded"]).check()
    matrix = cross_validate(catalogue()["documents"], "cpu", ["banded"])
    assert "knows bands only, not documents()" in str(matrix)


def test_its_plans_are_one_operator_of_a_whole_graph_though_it_registers_none(installed):
    spec = attnplan.AttentionSpec(seq_len=32, heads=2, head_dim=8, causal=True, dtype="float32")
    plan = attnplan.compile(spec, backend="banded")
    q, k, v = (torch.randn(1, 2, 32, 8, requires_grad=True) for _ in range(3))
    graphs = []
    both = [
        call(q, k, v)
        for call in (plan, torch.compile(plan, fullgraph=True, backend=lambda m, _: graphs.append(m) or m))
    ]
    assert [n.target for n in graphs[0].graph.nodes if "attnplan" in str(n.target)] == [torch.ops.attnplan.planned]
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in both), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda i, j, low, high: (
            (i - j >= (-(10**9) if low is None else low)) & (i - j < (10**9 if high is None else high))
        ),
        lambda i, j, low, high: (
            (i - j > (-(10**9) if low is None else low)) & (i - j <= (10**9 if high is None else high))
        ),
    ],
    ids=["short on the left", "short on the right"],
)
def test_a_window_that_is_one_key_short_is_caught(wrong, installed, monkeypatch):
    import banded_attention.emit as emitter

    monkeypatch.setattr(emitter, "in_band", wrong)
    with pytest.raises(VerifyError, match=r"banded \(dense\): output"):
        cross_validate(catalogue()["window"], "cpu", ["banded"]).check()


def run_pytest(installed, *arguments):
    paths = [str(installed), str(EXAMPLE), str(EXAMPLE.parent.parent)]
    code = f"import sys; sys.path[:0] = {paths!r}; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    rootdir = ("--rootdir", str(EXAMPLE), "-c", str(EXAMPLE / "pyproject.toml"), "-p", "no:cacheprovider", "-q")
    where = str(EXAMPLE / "tests")
    return subprocess.run([sys.executable, "-c", code, *rootdir, where, "--attnplan-device", "cpu", *arguments],
                          capture_output=True, text=True, check=False)  # fmt: skip


def test_the_tests_of_the_example_pass_and_say_what_is_refused(installed):
    done = run_pytest(installed, "-rs", "-k", "window or documents", "--attnplan-dtype", "float64")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "banded refuses: knows bands only, not" in done.stdout
    assert " passed" in done.stdout


def test_the_tests_of_the_example_fail_where_its_window_is_short(installed):
    package = installed / "banded_attention"
    package.mkdir()
    for file in (EXAMPLE / "banded_attention").glob("*.py"):
        text = file.read_text()
        (package / file.name).write_text(text.replace("i - j <= high", "i - j < high"))
    done = run_pytest(installed, "-k", "causal and window", "--tb=short")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "differs" in done.stdout


def test_the_plugin_names_a_backend_that_is_not_there(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "def test_it(attnplan_case, attnplan_validate):\n    attnplan_validate('nobody', attnplan_case)\n"
    )
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "attnplan.testing.plugin", "-p", "no:cacheprovider",
                           "-q", "--rootdir", str(tmp_path), "-k", "causal", str(tmp_path), "--attnplan-device", "cpu"],
                          capture_output=True, text=True, check=False, cwd=EXAMPLE.parent.parent)  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no installed package provides the backend 'nobody'" in done.stdout


def test_the_example_is_sixty_lines_of_code():
    lines = 0
    for path in (EXAMPLE / "banded_attention").glob("*.py"):
        tree = ast.parse(path.read_text())
        bodies = [n.body for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        documented = [b[0] for b in bodies if isinstance(b[0], ast.Expr) and isinstance(b[0].value, ast.Constant)]
        skipped = {i for d in documented for i in range(d.lineno, (d.end_lineno or d.lineno) + 1)}
        each = enumerate(path.read_text().splitlines(), 1)
        lines += sum(bool(line.strip()) and number not in skipped for number, line in each)
    assert 40 <= lines <= 60


def test_a_case_of_ones_own_is_validated_too():
    case = Case("mine", SPEC)
    assert cross_validate(case, "cpu").name == "mine"
