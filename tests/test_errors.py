from __future__ import annotations

import pytest

from attnplan import errors
from attnplan.errors import AttnPlanError, did_you_mean

KINDS = [errors.SpecError, errors.VerifyError, errors.PassError, errors.MemoryBudgetError, errors.NoBackendError]


@pytest.mark.parametrize("kind", [*KINDS, errors.RingError])
def test_every_error_is_caught_by_the_root(kind):
    with pytest.raises(AttnPlanError, match="why"):
        raise kind("why")


def test_errors_are_what_python_programs_expect():
    assert issubclass(errors.SpecError, ValueError)
    assert issubclass(errors.MemoryBudgetError, MemoryError)
    assert not issubclass(errors.PassError, ValueError)


def test_every_public_error_has_the_root():
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert all(issubclass(e, AttnPlanError) for e in found)
    assert len(found) == 9


def test_suggestions_name_the_nearest_word_or_all_of_them():
    assert did_you_mean("cuasal", ["causal", "window"]) == "; did you mean 'causal'?"
    assert did_you_mean("xyz", {"b", "a"}) == "; known: a, b"
    assert did_you_mean("xyz", iter(["b", "a"])) == "; known: a, b"
