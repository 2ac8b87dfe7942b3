"""Cross-validation: every backend, schedule and strategy that accepts a spec, against a float64 reference.

For users, ``attnplan verify SPEC --backends all`` is the same as a command. For authors of backends,
:mod:`attnplan.testing.plugin` brings the catalogue to pytest.
"""

from attnplan.testing.catalogue import Case, catalogue
from attnplan.testing.matrix import Matrix, Report, Result, merge
from attnplan.testing.validate import cross_validate, cross_validate_catalogue

__all__ = [
    "Case",
    "Matrix",
    "Report",
    "Result",
    "catalogue",
    "cross_validate",
    "cross_validate_catalogue",
    "merge",
]
