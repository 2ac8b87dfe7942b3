"""The wheel: what it holds, and that the tutorial begins in an environment that has nothing else of ours."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs_blocks import blocks

BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE")
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a copy: what older builds have left in the checkout must not get in."""
    source, into = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "attnplan", source / "attnplan", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("tests", "bench", "examples", "docs"):  # beside the package, as in the checkout
        (source / folder).mkdir()
        (source / folder / "__init__.py").touch()
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", into]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [made] = into.iterdir()
    return made


def test_the_wheel_holds_one_package_and_its_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [n for n in names if n.endswith(".dist-info/METADATA")]
        said = email.message_from_bytes(archive.read(metadata))
        [entry] = [archive.read(n).decode() for n in names if n.endswith("entry_points.txt")]
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"attnplan"}
    package = {n for n in names if n.startswith("attnplan/")}
    own = {p.relative_to(ROOT).as_posix() for p in (ROOT / "attnplan").rglob("*") if p.is_file()}
    assert package == {n for n in own if "__pycache__" not in n}
    assert {"attnplan/cost/devices.toml", "attnplan/py.typed", "attnplan/backends/eager/emit.py"} <= package
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert wheel.stat().st_size < MEGABYTE
    assert said["Name"] == "attnplan"
    assert "attnplan = attnplan.cli:main" in entry
    required = {r.split(">")[0] for r in said.get_all("Requires-Dist") if "extra" not in r}
    assert required == {"attrs", "cattrs", "click", "networkx", "numpy", "rich", "torch"}


@pytest.mark.slow
def test_the_tutorial_begins_in_an_environment_of_its_own(wheel, tmp_path):
    """Install the wheel alone; its dependencies are those of this environment, in which the checkout is left out."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    [site] = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    others = [p for p in sys.path if p and Path(p).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others), encoding="utf-8")
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    first, second = blocks(page, "python")[:2]
    code = f"{first.text}\n{second.text}\nprint(attnplan.__file__)\nprint(tuple(out.shape))\nprint(plan.explain())"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    where, shape, page = done.stdout.split("\n", 2)
    assert Path(where).is_relative_to(tmp_path), f"imported from {where}"
    assert shape == "(1, 8, 2048, 32)"
    assert page.startswith("window(256) | sinks(4), causal\n")
    command = [tmp_path / "venv" / "bin" / "attnplan", "devices"]
    listed = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True)
    assert "NVIDIA H100" in listed.stdout
