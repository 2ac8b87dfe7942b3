"""Pictures of plans, by matplotlib: the mask, the roofline, time against length, the graph, and a ring."""

from attnplan.pictures.facts import graph_facts, length_facts, mask_facts, roofline_facts
from attnplan.pictures.graph import graph_figure, heading
from attnplan.pictures.length import length_figure
from attnplan.pictures.mask import mask_figure
from attnplan.pictures.ring import ring_facts, ring_figure
from attnplan.pictures.roofline import roofline_figure
from attnplan.pictures.style import inline_svg, require_matplotlib, save, suffix

__all__ = [
    "graph_facts",
    "graph_figure",
    "heading",
    "inline_svg",
    "length_facts",
    "length_figure",
    "mask_facts",
    "mask_figure",
    "require_matplotlib",
    "ring_facts",
    "ring_figure",
    "roofline_facts",
    "roofline_figure",
    "save",
    "suffix",
]
