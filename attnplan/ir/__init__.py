"""The intermediate representation: frozen nodes whose types say which rows of which tensor they hold."""

from attnplan.ir.graph import Builder, Graph, Node, rewrite
from attnplan.ir.ops import Attend, Input, Merge, Mix, Op, Output, Receive, Take, TensorType
from attnplan.ir.rows import Axis, RowMap
from attnplan.ir.text import parse_graph, print_graph

__all__ = [
    "Attend",
    "Axis",
    "Builder",
    "Graph",
    "Input",
    "Merge",
    "Mix",
    "Node",
    "Op",
    "Output",
    "Receive",
    "RowMap",
    "Take",
    "TensorType",
    "parse_graph",
    "print_graph",
    "rewrite",
]
