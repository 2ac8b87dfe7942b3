"""A pytest plugin with which authors of backends validate them against the catalogue.

In the top ``conftest.py`` of the package that provides the backend::

    pytest_plugins = ["attnplan.testing.plugin"]

and in a test module::

    def test_my_backend(attnplan_case, attnplan_validate):
        attnplan_validate("my-backend", attnplan_case)

The test runs once for each case of the catalogue. It is skipped with every reason where the backend refuses, and fails
with every error where the backend accepts and does not compute the spec. The backend is found through the entry-point
group ``attnplan.backends``; one that cannot be loaded fails every test with its exception.

Options: ``--attnplan-device``, ``--attnplan-size`` and ``--attnplan-dtype`` (may be given several times).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attnplan.backends import registry
from attnplan.cost import resolve
from attnplan.spec import AttentionSpec
from attnplan.testing.catalogue import SIZES, Case, catalogue
from attnplan.testing.matrix import Matrix
from attnplan.testing.validate import cross_validate

Validate = Callable[[str, "Case | AttentionSpec"], Matrix]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("attnplan")
    group.addoption("--attnplan-device", default="auto", metavar="DEVICE", help="where backends are validated")
    group.addoption("--attnplan-size", default=None, choices=list(SIZES), help="lengths; default: large on a GPU")
    group.addoption("--attnplan-dtype", action="append", metavar="DTYPE", help="default: float32; bfloat16 on a GPU")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``attnplan_case`` once for each case and dtype."""
    if "attnplan_case" not in metafunc.fixturenames:
        return
    on_gpu = resolve(metafunc.config.getoption("--attnplan-device")).device.kind != "cpu"
    size = metafunc.config.getoption("--attnplan-size") or ("large" if on_gpu else "small")
    dtypes = metafunc.config.getoption("--attnplan-dtype") or ["bfloat16" if on_gpu else "float32"]
    cases = [(dtype, case) for dtype in dtypes for case in catalogue(size, dtype).values()]
    metafunc.parametrize("attnplan_case", [c for _, c in cases], ids=[f"{c.name}-{dtype}" for dtype, c in cases])


@pytest.fixture
def attnplan_validate(request: pytest.FixtureRequest) -> Validate:
    """Return ``validate(backend, case)``: cross-validate one backend on one case, or on a spec."""
    device = request.config.getoption("--attnplan-device")

    def validate(backend: str, case: Case | AttentionSpec) -> Matrix:
        known = registry()
        if backend in known.broken:
            pytest.fail(f"{backend}: {known.broken[backend]}", pytrace=False)
        if backend not in known.backends:
            pytest.fail(f"no installed package provides the backend {backend!r}: there are {list(known.backends)}; "
                        "is its entry point in the group attnplan.backends?", pytrace=False)  # fmt: skip
        matrix = cross_validate(case, device, [backend])
        if matrix.wrong:
            pytest.fail(str(matrix), pytrace=False)
        if not matrix.ran:
            reasons = dict.fromkeys(why for r in matrix.refused for why in r.reasons)
            pytest.skip(f"{backend} refuses: {'; '.join(reasons)}")
        return matrix

    return validate
