"""The whole catalogue of attnplan: what the backend accepts must be right, what it refuses is skipped with reasons."""


def test_banded(attnplan_case, attnplan_validate):
    attnplan_validate("banded", attnplan_case)
