"""The packages that plans run on, and which versions of them are installed. Nothing here imports them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

PACKAGES = ("torch", "triton", "xformers", "mslk", "flash-attn", "flash-attn-3", "flash-attn-4")
"""Packages on whose versions a plan, and what was measured of it, depends."""


def installed(names: Iterable[str] = ("attnplan", *PACKAGES)) -> dict[str, str]:
    """Return the version of each package that is installed.

    Examples
    --------
    >>> sorted(installed(["no-such-package", "attrs"]))
    ['attrs']
    """
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
