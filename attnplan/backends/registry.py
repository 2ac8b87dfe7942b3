"""The backends that exist: the built-in ones, and those that other packages provide as entry points."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata

from attnplan.backends.base import Backend
from attnplan.backends.compiled import Compiled
from attnplan.backends.eager import Eager
from attnplan.backends.flash import Flash
from attnplan.backends.reference import Reference
from attnplan.backends.xformers import XFormers
from attnplan.errors import AttnPlanError, SpecError, did_you_mean

GROUP = "attnplan.backends"


class Registry:
    """Backends by name. A duplicate name is an error that lists both providers."""

    def __init__(self) -> None:
        self._backends: dict[str, Backend] = {}
        self._providers: dict[str, str] = {}
        self.broken: dict[str, str] = {}
        """Entry points that could not be loaded, with the reason."""

    def register(self, backend: Backend, provider: str = "attnplan") -> None:
        """Add a backend.

        Raises
        ------
        AttnPlanError
            If the name is taken.

        Examples
        --------
        >>> registry = Registry()
        >>> registry.register(Eager())
        >>> registry.register(Eager(), "another-package")
        Traceback (most recent call last):
        ...
        attnplan.errors.AttnPlanError: backend 'eager' is provided twice: by attnplan and by another-package
        """
        if backend.name in self._backends:
            first = self._providers[backend.name]
            raise AttnPlanError(f"backend {backend.name!r} is provided twice: by {first} and by {provider}")
        self._backends[backend.name] = backend
        self._providers[backend.name] = provider

    def load_entry_points(self) -> None:
        """Add the backends of other packages; one that fails to load is remembered with its exception."""
        for point in metadata.entry_points(group=GROUP):
            provider = point.dist.name if point.dist else point.value
            try:
                backend = point.load()()
            except Exception as error:  # whatever another package raises at import must not stop planning
                self.broken[point.name] = f"entry point of {provider} failed: {type(error).__name__}: {error}"
                continue
            self.register(backend, provider)

    @property
    def backends(self) -> Mapping[str, Backend]:
        """The backends by name."""
        return dict(self._backends)

    def get(self, name: str) -> Backend:
        """Return a backend by name; raise :class:`~attnplan.errors.SpecError` with a suggestion if there is none."""
        if name not in self._backends:
            raise SpecError(f"unknown backend {name!r}{did_you_mean(name, [*self._backends, 'auto'])}")
        return self._backends[name]


@lru_cache(maxsize=1)
def registry() -> Registry:
    """Return the registry of this process."""
    made = Registry()
    for backend in (Eager(), XFormers(), Flash(), Compiled(), Reference()):
        made.register(backend)
    made.load_entry_points()
    return made
