"""What a pass is."""

from __future__ import annotations

from typing import ClassVar

import attrs

from attnplan.ir import Graph


@attrs.frozen
class Pass:
    """A pure rewrite with a kebab-case name; its fields are its options.

    The graph is verified, and its coverage compared with the spec's, before and after every pass, not during one.
    Returning the same object means that nothing changed.
    """

    name: ClassVar[str]

    def __call__(self, graph: Graph) -> Graph:
        """Return the rewritten graph."""
        raise NotImplementedError
