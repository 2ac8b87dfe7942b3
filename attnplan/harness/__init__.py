"""Measuring plans beside one another and beside kernels called by hand: times, memory, correctness, in one process."""

from attnplan.harness.entrants import Asked, Contestant, contest, contestants
from attnplan.harness.rows import environment, read_rows, table, write_rows

__all__ = ["Asked", "Contestant", "contest", "contestants", "environment", "read_rows", "table", "write_rows"]
