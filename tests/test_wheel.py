"""The wheel: what it holds, and that the tutorial works in an environment that has nothing else of ours."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs_blocks import blocks

TUTORIAL = """
import doctest, json, pathlib, re, shlex, subprocess, sys

attnplan_command = str(pathlib.Path(sys.executable).parent / "attnplan")
space, ran = {}, 0
for language, text in json.load(sys.stdin):
    if language == "python":
        exec(text, space)
    elif language == "pycon":
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
        test = doctest.DocTestParser().get_doctest(text, space, "tutorial", None, 0)
        assert not doctest.DocTestRunner(optionflags=flags).run(test, clear_globs=False).failed
        space.update(test.globs)
    elif language == "toml":
        pathlib.Path(re.match(r"# (\\S+)\\n", text)[1]).write_text(text, encoding="utf-8")
    else:
        for line in re.findall(r"(?m)^\\$ attnplan (.+)$", text):
            subprocess.run([attnplan_command, *shlex.split(line)], check=True, capture_output=True)
    ran += 1
print(space["attnplan"].__file__, ran)
"""
"""Runs the blocks of a page that it reads from standard input: in an environment without our tests."""
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
def test_the_tutorial_works_in_an_environment_of_its_own(wheel, tmp_path):
    """Install the wheel alone; its dependencies are those of this environment, in which the checkout is left out."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    [site] = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    others = [p for p in sys.path if p and Path(p).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others), encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    script = tmp_path / "tutorial.py"
    script.write_text(TUTORIAL, encoding="utf-8")
    steps = [[b.language, b.text] for b in blocks((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))]
    assert {language for language, _ in steps} == {"python", "pycon", "console", "toml"}
    done = subprocess.run(
        [python, script], input=json.dumps(steps), cwd=elsewhere, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    where, ran = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path), f"imported from {where}"
    assert int(ran) == len(steps)
    command = [tmp_path / "venv" / "bin" / "attnplan", "devices"]
    listed = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True)
    assert "NVIDIA H100" in listed.stdout
