"""Pictures of plans, by matplotlib: the mask, the roofline, time against length, and the graph."""

from attnplan.pictures.graph import graph_figure, heading
from attnplan.pictures.length import length_figure
from attnplan.pictures.mask import mask_figure
from attnplan.pictures.roofline import roofline_figure
from attnplan.pictures.style import inline_svg, require_matplotlib, save, suffix

__all__ = [
    "graph_figure",
    "heading",
    "inline_svg",
    "length_figure",
    "mask_figure",
    "require_matplotlib",
    "roofline_figure",
    "save",
    "suffix",
]
