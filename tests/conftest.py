"""Golden texts and the hypothesis profiles."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
COMPILING = (
    "test_compiled_backend",
    "test_compile_traces",
    "test_compile_export",
    "test_compile_flex",
    "test_compile_dynamo",
    "test_compile_distributed",
)
GOLDEN = Path(__file__).resolve().parent / "golden"

if str(ROOT) not in sys.path:  # so that test files find `tests.oracle` however pytest was started
    sys.path.insert(0, str(ROOT))

# What the user calibrated, tuned or described must not decide about a test; nothing makes this directory by itself.
os.environ["ATTNPLAN_CACHE"] = str(Path(tempfile.gettempdir()) / f"attnplan-tests-{os.getpid()}")
os.environ.pop("ATTNPLAN_DEVICES", None)

settings.register_profile(
    "repo", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("repo"), derandomize=False, max_examples=1000)
settings.load_profile("repo")  # `pytest --hypothesis-profile thorough` searches anew each time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt from what the code does")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare ``text`` with ``tests/golden/<name>.txt``, or rewrite that file under ``--update-golden``."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no {path}: run pytest --update-golden and review it"
        assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; if that is meant, run --update-golden"

    return check


@pytest.fixture(autouse=True)
def compiled_programs_run_as_written(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave Inductor out, except in tests of compiling: the numbers are those of the same functions, minutes sooner."""
    if request.module is None or "torch" not in sys.modules or request.node.get_closest_marker("gpu"):
        return
    if request.module.__name__.split(".")[-1] in COMPILING:
        return

    def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
                return function(*args)

        return run

    monkeypatch.setattr("attnplan.runtime.compiling.compiled", as_written)


@pytest.fixture
def provide(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Return a function that makes entry points the installed ones, and the registry forget what it knew."""
    import attnplan
    from attnplan.backends import registry

    def install(*points: Any) -> Any:
        found = {"attnplan.backends": points}
        monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: found.get(group, ()))
        registry.cache_clear()
        attnplan.cache_clear()
        return registry()

    yield install
    monkeypatch.undo()
    registry.cache_clear()
    attnplan.cache_clear()


@pytest.fixture
def faulty(provide: Callable[..., Any]) -> type:
    """Install the backend that computes the published faults, and return its class."""
    from tests.faulty import HERE, Faulty
    from tests.test_registry import point

    provide(point("faulty", f"{HERE}:Faulty"))
    return Faulty


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    """Forget all plans before a test and after it."""
    import attnplan

    attnplan.cache_clear()
    yield
    attnplan.cache_clear()
