"""Exact block tables: every tile of a pattern is full, partial or empty, found without looking at every pair."""

from attnplan.patterns.tiles import blocks, neighborhoods, strides  # their rules register themselves
from attnplan.patterns.tiles.grid import Grid
from attnplan.patterns.tiles.table import BlockTable, block_table, kept_tiles, tile_pairs

__all__ = ["BlockTable", "Grid", "block_table", "blocks", "kept_tiles", "neighborhoods", "strides", "tile_pairs"]
