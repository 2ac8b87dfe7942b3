"""Backends of other packages: found by entry point, reported where they are broken, never in the way."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import ClassVar

import attrs
import pytest
import torch
from click.testing import CliRunner

import attnplan
from attnplan import AttentionSpec
from attnplan.backends import Registry, Schedule, registry
from attnplan.backends.base import Backend
from attnplan.backends.eager import Eager
from attnplan.backends.reference import Reference
from attnplan.backends.reference import emit as reference_emit
from attnplan.cli import main
from attnplan.cost import KernelModel
from attnplan.errors import AttnPlanError, NoBackendError, SpecError

SPEC = AttentionSpec(seq_len=16, heads=2, head_dim=8, dtype="float64", causal=True)


@attrs.frozen(cache_hash=True)
class Quick(Backend):
    """A backend of another package, faster than anything, that runs what the reference runs."""

    name: ClassVar[str] = "quick"
    emitter: ClassVar[str] = "attnplan.backends.reference.emit"
    packages: ClassVar[tuple[str, ...]] = ("pytest",)

    def schedules(self, device):
        return (Schedule("warp", KernelModel(efficiency=1.0), "as if by magic"),)

    def refuse(self, graph, spec, schedule, device):
        return ("only causal attention",) if not spec.causal else ()


class Missing(Quick):
    name: ClassVar[str] = "missing"
    packages: ClassVar[tuple[str, ...]] = ("no-such-package-at-all",)


def fail():
    raise RuntimeError("its constructor failed")


def point(name, value, package="quick-attention"):
    """Return an entry point of a package that is not installed."""
    made = EntryPoint(name, value, "attnplan.backends")
    vars(made)["dist"] = SimpleNamespace(name=package)
    return made


HERE = __name__
BUILT_IN = ["eager", "xformers", "flash", "compiled", "reference"]


def test_the_built_in_backends_come_first(provide):
    assert list(provide().backends) == BUILT_IN
    assert provide() is registry()


def test_a_backend_of_another_package_is_chosen_and_runs(provide):
    found = provide(point("quick", f"{HERE}:Quick"))
    assert list(found.backends) == [*BUILT_IN, "quick"]
    assert found.broken == {}
    plan = attnplan.compile(SPEC, backend="quick")
    assert (plan.backend, plan.schedule) == ("quick", "warp")
    q = torch.randn(1, 2, 16, 8, dtype=torch.float64)
    torch.testing.assert_close(plan(q, q, q), attnplan.compile(SPEC, backend="eager")(q, q, q))
    assert attnplan.compile(SPEC).backend in ("quick", "eager")
    assert "dense > quick (warp)" in {c.name for c in attnplan.compile(SPEC).candidates}
    assert reference_emit.__name__ == Quick.emitter


def test_the_reasons_of_another_package_are_listed(provide):
    provide(point("quick", f"{HERE}:Quick"), point("missing", f"{HERE}:Missing"))
    refused = {c.name: c.reasons for c in attnplan.compile(attrs.evolve(SPEC, causal=False)).candidates}
    assert refused["dense > quick (warp)"] == ("only causal attention",)
    assert refused["dense > missing (warp)"][0] == "package 'no-such-package-at-all' is not installed"
    with pytest.raises(NoBackendError, match=r"dense > missing .*package 'no-such-package-at-all' is not installed"):
        attnplan.compile(SPEC, backend="missing")
    elsewhere = attnplan.compile(SPEC, backend="missing", device="h100")
    assert elsewhere.backend == "missing", "it may be installed there"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module_at_all:Backend", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        (f"{HERE}:NoSuchName", "AttributeError: .*NoSuchName"),
        (f"{HERE}:fail", "RuntimeError: its constructor failed"),
    ],
)
def test_an_entry_point_that_fails_is_reported_and_not_raised(provide, value, reason):
    found = provide(point("bad", value), point("quick", f"{HERE}:Quick"))
    assert list(found.backends) == [*BUILT_IN, "quick"], "the others still load"
    assert list(found.broken) == ["bad"]
    assert attnplan.compile(SPEC)
    with pytest.raises(NoBackendError, match=f"bad: entry point of quick-attention failed: {reason}"):
        attnplan.compile(attrs.evolve(SPEC, causal=False, dtype="bfloat16"), device="gtx1080")
    listed = CliRunner().invoke(main, ["backends"])
    assert listed.exit_code == 0
    assert "bad" in listed.output
    assert "refused   entry point of quick-attention failed" in listed.output


def test_a_name_that_is_provided_twice_is_an_error_that_names_both(provide):
    with pytest.raises(AttnPlanError, match="backend 'quick' is provided twice: by one-package and by another-package"):
        provide(point("quick", f"{HERE}:Quick", "one-package"), point("quick", f"{HERE}:Quick", "another-package"))


def test_a_built_in_name_cannot_be_taken(provide):
    with pytest.raises(AttnPlanError, match="backend 'eager' is provided twice: by attnplan and by quick-attention"):
        provide(point("eager", "attnplan.backends.eager:Eager"))


def test_a_registry_is_filled_by_hand_too():
    made = Registry()
    made.register(Eager())
    made.register(Reference(), "somewhere")
    assert made.get("eager") == Eager()
    with pytest.raises(AttnPlanError, match="'reference' is provided twice: by somewhere and by attnplan"):
        made.register(Reference())
    with pytest.raises(SpecError, match="unknown backend 'flsh'; known: auto, eager, reference"):
        made.get("flsh")
