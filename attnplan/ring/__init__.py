"""Ring attention: layouts, transports, and the programs of ranks. Nothing here imports torch."""

from attnplan.ring.build import programs, rank_graph, rank_program
from attnplan.ring.choose import RingCandidate, choose
from attnplan.ring.layouts import LAYOUTS, Layout
from attnplan.ring.mesh import Mesh
from attnplan.ring.program import Exchange, Hop, RankProgram, traffic
from attnplan.ring.proof import check_ring
from attnplan.ring.transports import TRANSPORTS

__all__ = [
    "LAYOUTS",
    "TRANSPORTS",
    "Exchange",
    "Hop",
    "Layout",
    "Mesh",
    "RankProgram",
    "RingCandidate",
    "check_ring",
    "choose",
    "programs",
    "rank_graph",
    "rank_program",
    "traffic",
]
