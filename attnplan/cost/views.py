"""How long the host takes over the rows of an attend, counted in operators that take as long."""

from __future__ import annotations

from attnplan.cost.joins import pull_of
from attnplan.cost.setting import Setting
from attnplan.ir import Attend, Node, Take

_OF_ROWS, _OF_FUSED = 1, 3
"""Views of rows where they stand, and those in a program of Inductor's."""
_OF_FOLDS = (1, 3)
"""Views that fold the axes of such rows into a kernel's two batch dimensions, forward and backward."""
_OF_COPIES = (3, 7)
"""Views before rows are copied by operators; a backward copies rows of the output and its gradient besides."""
_OF_INDICES = (38, 19)
"""Indices by which plain torch takes rows and puts them into an output, and autograd's of the same."""


def views_of(node: Node, setting: Setting, *, back: bool = False) -> int:
    """Return as how many operators the host's work on an attend's rows counts, forward or backward.

    A join that pulls gets rows folded already, and its gradients need no rows of the output; what one kernel gathers
    needs no views at all.
    """
    op, kernel = node.op, setting.kernel
    assert isinstance(op, Attend)
    if kernel.fuses:
        return _OF_FUSED
    taken = [n for n in setting.graph.args(node) if isinstance(n.op, Take)]
    if not taken:
        return 0
    if kernel.materialises:
        return _OF_INDICES[back]
    pulled = pull_of(setting.graph) is not None
    if setting.copied.intersection(n.id for n in taken):
        return 0 if op.launch is not None or (pulled and back) else _OF_COPIES[back]
    folded = not pulled and max(len(n.type.rows.batch) for n in taken) > 1
    return _OF_ROWS + folded * _OF_FOLDS[back]
