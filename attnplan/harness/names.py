"""The names by which contestants are asked for."""

from __future__ import annotations

from attnplan.backends import registry
from attnplan.errors import SpecError, did_you_mean

PEERS = ("sdpa", "cudnn", "flex", "fa4")


def check_names(backends: str, peers: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the backends and the calls by hand that two lists separated by commas name.

    Raises
    ------
    SpecError
        If a name is unknown.

    Examples
    --------
    >>> backends, peers = check_names("eager", "sdpa,flex")
    >>> sorted(backends), sorted(peers)
    (['eager'], ['flex', 'sdpa'])
    """
    found = []
    for what, text, known in (("backend", backends, tuple(registry().backends)), ("peer", peers, PEERS)):
        names = [n.strip() for n in text.split(",") if n.strip()]
        for name in names:
            if name not in known:
                raise SpecError(f"unknown {what} {name!r}{did_you_mean(name, known)}")
        found.append(frozenset(names))
    return found[0], found[1]
