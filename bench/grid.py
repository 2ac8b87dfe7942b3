"""The grids on which the planner is judged: one for a GPU, one for a small CPU.

Most informative first, so that a run that is cut short still tells something of every family. ``flex`` marks the specs
whose FlexAttention is measured: each costs a compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan import AttentionSpec
from attnplan import patterns as P

FAMILIES = ("dense", "window", "documents", "blocks", "longnet", "grouped", "union")


@attrs.frozen
class Case:
    """One spec of a grid."""

    name: str
    family: str
    spec: AttentionSpec = attrs.field(repr=False)
    rank: int
    """Measured in this order."""
    flex: bool = False
    operands: dict[str, Tensor] | None = attrs.field(default=None, eq=False, repr=False)

    @property
    def sparse(self) -> bool:
        return self.family != "dense"


def _size(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


class Builder:
    """Collects cases, each shape with one or both of the modes."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.cases = dtype, list[Case]()

    def add(self, family: str, what: str, batch: int, heads: int, rows: int, dim: int, *, modes: str = "ft",
            rank: int = 1, flex: str = "", operands: Any = None, **options: Any) -> None:  # fmt: skip
        options = {"dtype": self.dtype, **options}
        for mode in modes:
            training = mode == "t"
            spec = AttentionSpec(seq_len=rows, heads=heads, head_dim=dim, batch=batch, training=training, **options)
            extra = "".join(
                f" {short}{options[key]}"
                for key, short in (("kv_heads", "kv"), ("kv_len", "K"), ("layout", ""))
                if key in options
            )
            half = "" if options["dtype"] == self.dtype else f" {options['dtype']}"
            causal = ", causal" if options.get("causal") else ""
            work = "training" if training else "forward"
            name = f"{family}: {what}{causal} B{batch} H{heads} S{_size(rows)} D{dim}{extra}{half}, {work}"
            self.cases.append(Case(name, family, spec, rank, mode in flex, operands))

    def sorted(self) -> list[Case]:
        """Return the cases by rank; in every prefix of a rank families have about their share of it."""
        names = [c.name for c in self.cases]
        assert len(set(names)) == len(names), "names tell specs apart"
        groups = [(rank, family) for rank in sorted({c.rank for c in self.cases}) for family in FAMILIES]
        order = []
        for rank, family in groups:
            mine = [c for c in self.cases if (c.rank, c.family) == (rank, family)]
            order += [(rank, (i + 0.5) / len(mine), self.cases.index(c)) for i, c in enumerate(mine)]
        return [self.cases[place] for _, _, place in sorted(order)]


def gpu() -> list[Case]:
    """Return the grid for a GPU, in bfloat16."""
    grid = Builder("bfloat16")
    for part in (_dense, _windows, _documents, _blocks, _longnet, _grouped, _unions):
        part(grid)
    return grid.sorted()


def _dense(grid: Builder) -> None:
    for causal in (False, True):
        pattern: dict[str, Any] = {"pattern": P.full(), "causal": causal}
        for batch, heads, rows, dim, modes, rank, flex in (
            (1, 16, 16_384, 128, "ft", 0, "ft"), (16, 16, 2048, 64, "ft", 0, "f"), (4, 8, 4096, 128, "ft", 1, ""),
            (1, 8, 8192, 64, "ft", 1, "f"), (8, 16, 1024, 128, "ft", 0, "f"), (8, 16, 512, 64, "ft", 1, ""),
            (1, 16, 4096, 256, "ft", 1, ""), (1, 1, 16_384, 64, "ft", 1, ""), (1, 8, 1024, 64, "ft", 0, "ft"),
            (4, 16, 512, 128, "f", 2, ""), (2, 8, 256, 64, "ft", 2, ""), (1, 12, 32_768, 64, "f", 2, ""),
            (1, 4, 2048, 256, "f", 2, ""), (1, 1, 1024, 128, "f", 2, ""), (32, 4, 128, 64, "f", 2, ""),
        ):  # fmt: skip
            grid.add("dense", "full", batch, heads, rows, dim, modes=modes, rank=rank, flex=flex, **pattern)
    grid.add("dense", "full", 2, 32, 4096, 128, causal=True, kv_heads=8, rank=1)
    grid.add("dense", "full", 16, 32, 1, 128, causal=True, kv_heads=8, kv_len=8192, modes="f", rank=1)
    grid.add("dense", "full", 4, 16, 512, 64, kv_len=8192, modes="ft", rank=2)
    grid.add("dense", "full", 2, 8, 2000, 96, causal=True, modes="ft", rank=2)
    grid.add("dense", "full", 1, 16, 4096, 64, causal=True, layout="bshd", modes="ft", rank=2)
    grid.add("dense", "full", 1, 8, 2048, 64, causal=True, dtype="float32", modes="ft", rank=2)


def _windows(grid: Builder) -> None:
    for left, causal, batch, heads, rows, dim, modes, rank, flex in (
        (511, True, 1, 16, 16_384, 128, "ft", 0, "f"), (4095, True, 1, 16, 65_536, 128, "f", 0, "f"),
        (1023, True, 2, 16, 8192, 64, "ft", 1, "ft"), (128, True, 4, 12, 4096, 64, "ft", 1, ""),
        (4095, True, 1, 8, 16_384, 64, "ft", 2, ""), (256, False, 1, 16, 16_384, 128, "ft", 1, "f"),
        (64, False, 8, 8, 1024, 64, "ft", 1, ""), (512, False, 1, 8, 4096, 256, "f", 2, ""),
        (255, True, 1, 4, 131_072, 64, "f", 2, ""), (1024, True, 16, 8, 2048, 128, "f", 2, ""),
    ):  # fmt: skip
        grid.add("window", f"window {left}", batch, heads, rows, dim, modes=modes, rank=rank, flex=flex,
                 pattern=P.window(left), causal=causal)  # fmt: skip


def _documents(grid: Builder) -> None:
    varied = (4096, 512, 2048, 128, 6144, 1024, 896, 1536)
    for batch, heads, dim, causal, modes, rank, flex in (
        (1, 16, 128, True, "ft", 0, "f"), (1, 8, 64, False, "ft", 1, "f"), (2, 8, 64, True, "f", 2, ""),
    ):  # fmt: skip
        grid.add("documents", "8 known", batch, heads, sum(varied), dim, modes=modes, rank=rank, flex=flex,
                 pattern=P.documents(list(varied)), causal=causal)  # fmt: skip
    for batch, heads, rows, dim, causal, modes, rank in (
        (1, 16, 16_384, 128, True, "ft", 0), (1, 16, 4096, 64, True, "ft", 1), (1, 8, 32_768, 64, False, "f", 2),
        (1, 12, 8192, 64, True, "ft", 2),
    ):  # fmt: skip
        cuts = torch.linspace(0, rows, 9).round().int()
        grid.add("documents", "8 with the call", batch, heads, rows, dim, modes=modes, rank=rank,
                 pattern=P.documents(), causal=causal, operands={"documents": cuts})  # fmt: skip


def _blocks(grid: Builder) -> None:
    for keep, batch, heads, rows, dim, modes, rank, flex in (
        (0.1, 1, 16, 16_384, 128, "ft", 0, "ft"), (0.02, 1, 16, 65_536, 128, "f", 0, "f"),
        (0.5, 1, 8, 8192, 128, "ft", 1, ""), (0.2, 2, 8, 4096, 64, "ft", 1, "f"), (0.05, 1, 8, 16_384, 64, "ft", 1, ""),
        (0.1, 1, 12, 32_768, 64, "f", 2, ""), (0.5, 1, 16, 4096, 64, "f", 2, ""),
        (0.02, 1, 8, 16_384, 128, "ft", 2, ""),
        (0.2, 1, 4, 16_384, 128, "f", 2, ""), (0.05, 4, 4, 8192, 128, "f", 2, ""),
    ):  # fmt: skip
        grid.add("blocks", f"keep {keep}", batch, heads, rows, dim, modes=modes, rank=rank, flex=flex,
                 pattern=P.random_blocks(keep, 128, 0))  # fmt: skip
    grid.add("blocks", "keep 0.2", 1, 8, 8192, 64, pattern=P.random_blocks(0.2, 128, 0), causal=True, rank=2)


def _ladders(grid: Builder, name: str, pattern: Callable[..., Any], cases: Iterable[tuple[Any, ...]]) -> None:
    """Add mixtures of branches, each twice as long and as sparse as the one before."""
    for rows, heads, dim, batch, first, branches, causal, modes, rank in cases:
        lengths, rates = [first << i for i in range(branches)], [1 << i for i in range(branches)]
        grid.add(name, f"{branches} of {_size(first)}..{_size(lengths[-1])}", batch, heads, rows, dim,
                 modes=modes, rank=rank, pattern=pattern(lengths, rates), causal=causal)  # fmt: skip


def _longnet(grid: Builder) -> None:
    _ladders(grid, "longnet", P.longnet, (
        (65_536, 12, 64, 1, 2048, 5, False, "ft", 0), (131_072, 16, 128, 1, 4096, 4, False, "f", 0),
        (8192, 8, 64, 1, 512, 4, True, "ft", 0), (4096, 8, 64, 4, 512, 3, True, "ft", 1),
        (16_384, 12, 64, 1, 1024, 5, True, "ft", 1), (32_768, 16, 128, 1, 2048, 4, True, "ft", 1),
        (2048, 8, 64, 8, 256, 3, False, "ft", 1), (262_144, 8, 64, 1, 4096, 6, True, "f", 1),
        (16_384, 16, 128, 2, 2048, 3, False, "ft", 2), (1024, 16, 64, 2, 128, 3, True, "f", 2),
        (65_536, 8, 128, 1, 4096, 4, True, "f", 2), (24_576, 12, 64, 1, 2048, 3, True, "f", 2),
        (10_000, 12, 64, 1, 1024, 4, True, "f", 2),
    ))  # fmt: skip


def _grouped(grid: Builder) -> None:
    _ladders(grid, "grouped", P.grouped, (
        (65_536, 12, 64, 1, 2048, 5, False, "ft", 0), (131_072, 16, 128, 1, 4096, 4, False, "f", 1),
        (8192, 8, 64, 1, 2048, 2, False, "ft", 0), (16_384, 12, 64, 1, 1024, 4, True, "ft", 1),
        (4096, 8, 64, 4, 512, 4, True, "ft", 1), (32_768, 16, 128, 1, 2048, 4, True, "ft", 2),
        (2048, 16, 128, 4, 256, 4, False, "f", 2),
    ))  # fmt: skip


def _unions(grid: Builder) -> None:
    for what, pattern, causal, batch, heads, rows, dim, modes, rank, flex in (
        ("longformer 256 + 64", P.window(256) | P.global_tokens(64), False, 1, 12, 16_384, 64, "ft", 0, "f"),
        ("longformer 1024 + 128", P.window(1024) | P.global_tokens(128), False, 1, 16, 65_536, 128, "f", 1, ""),
        ("streaming 1023 + 4", P.window(1023) | P.sinks(4), True, 1, 16, 16_384, 128, "ft", 1, "f"),
        ("bigbird", P.bigbird(128, random_keep=0.03), False, 1, 8, 8192, 64, "f", 2, ""),
        ("strided 128", P.window(128) | P.strided(128), True, 1, 8, 8192, 64, "f", 2, ""),
        ("longformer 128 + 16", P.window(128) | P.global_tokens(16), False, 8, 8, 2048, 64, "ft", 2, ""),
    ):  # fmt: skip
        grid.add("union", what, batch, heads, rows, dim, modes=modes, rank=rank, flex=flex, pattern=pattern,
                 causal=causal)  # fmt: skip


def cpu() -> list[Case]:
    """Return the grid for a small CPU, in float32."""
    grid = Builder("float32")
    for causal in (False, True):
        for batch, heads, rows, dim, modes, rank in (
            (1, 4, 1024, 64, "ft", 0), (1, 8, 2048, 64, "ft", 1), (2, 4, 512, 128, "f", 1), (1, 2, 4096, 64, "f", 1),
            (1, 8, 256, 64, "ft", 1), (4, 4, 128, 32, "f", 2), (1, 1, 2048, 128, "f", 2),
        ):  # fmt: skip
            grid.add("dense", "full", batch, heads, rows, dim, modes=modes, rank=rank, causal=causal)
    grid.add("dense", "full", 4, 8, 1, 64, causal=True, kv_heads=2, kv_len=4096, modes="f", rank=1)
    for left, causal, heads, rows, dim, modes, rank in (
        (127, True, 4, 4096, 64, "ft", 0), (512, False, 4, 4096, 64, "f", 1), (64, True, 2, 8192, 64, "ft", 1),
        (1023, True, 4, 2048, 64, "f", 2), (255, False, 8, 1024, 32, "ft", 2), (256, True, 2, 16_384, 64, "f", 2),
    ):  # fmt: skip
        grid.add("window", f"window {left}", 1, heads, rows, dim, modes=modes, rank=rank, pattern=P.window(left),
                 causal=causal)  # fmt: skip
    varied = (512, 64, 256, 16, 768, 128, 112, 192)
    for heads, dim, causal, modes, rank in ((4, 64, True, "ft", 0), (4, 64, False, "f", 1), (8, 32, True, "f", 2)):
        grid.add("documents", "8 known", 1, heads, sum(varied), dim, modes=modes, rank=rank,
                 pattern=P.documents(list(varied)), causal=causal)  # fmt: skip
    for keep, heads, rows, modes, rank in (
        (0.1, 4, 2048, "ft", 0), (0.05, 2, 8192, "f", 1), (0.5, 4, 2048, "f", 1), (0.2, 4, 1024, "ft", 2),
    ):  # fmt: skip
        grid.add("blocks", f"keep {keep}", 1, heads, rows, 64, modes=modes, rank=rank,
                 pattern=P.random_blocks(keep, 128, 0))  # fmt: skip
    for maker, family in ((P.longnet, "longnet"), (P.grouped, "grouped")):
        for rows, heads, first, branches, causal, modes, rank in (
            (4096, 8, 512, 3, False, "ft", 0), (2048, 4, 256, 3, True, "ft", 1), (8192, 8, 512, 4, True, "f", 1),
            (1024, 4, 128, 2, True, "ft", 1), (16_384, 4, 1024, 4, False, "f", 2), (5000, 4, 512, 3, True, "f", 2),
        ):  # fmt: skip
            lengths, rates = [first << i for i in range(branches)], [1 << i for i in range(branches)]
            grid.add(family, f"{branches} of {_size(first)}..{_size(lengths[-1])}", 1, heads, rows, 64, modes=modes,
                     rank=rank, pattern=maker(lengths, rates), causal=causal)  # fmt: skip
    for what, pattern, causal, heads, rows, modes, rank in (
        ("longformer 128 + 16", P.window(128) | P.global_tokens(16), False, 4, 4096, "ft", 0),
        ("streaming 255 + 4", P.window(255) | P.sinks(4), True, 4, 4096, "ft", 1),
        ("strided 64", P.window(64) | P.strided(64), True, 2, 2048, "f", 2),
    ):  # fmt: skip
        grid.add("union", what, 1, heads, rows, 64, modes=modes, rank=rank, pattern=pattern, causal=causal)
    return grid.sorted()


def tiny() -> list[Case]:
    """Return a handful of tiny specs, to try a script."""
    grid = Builder("float32")
    grid.add("dense", "full", 1, 2, 64, 16, causal=True, rank=0)
    grid.add("window", "window 15", 1, 2, 256, 16, pattern=P.window(15), causal=True, rank=0)
    grid.add("documents", "2 with the call", 1, 2, 64, 16, pattern=P.documents(), modes="f",
             operands={"documents": torch.tensor([0, 16, 64], dtype=torch.int32)})  # fmt: skip
    grid.add("blocks", "keep 0.5", 1, 2, 256, 16, pattern=P.random_blocks(0.5, 128, 0), modes="f")
    grid.add("longnet", "2 of 32..64", 1, 2, 128, 16, pattern=P.longnet([32, 64], [1, 2]), causal=True)
    grid.add("grouped", "2 of 32..64", 1, 2, 128, 16, pattern=P.grouped([32, 64], [1, 2]), modes="f")
    grid.add("union", "longformer", 1, 2, 128, 16, pattern=P.window(8) | P.global_tokens(4), modes="f")
    return grid.sorted()


GRIDS = {"gpu": gpu, "cpu": cpu, "tiny": tiny}


def counts(cases: list[Case]) -> Iterator[tuple[str, int]]:
    for family in FAMILIES:
        yield family, sum(c.family == family for c in cases)


def later_flex(cases: Iterable[Case], first: int = 24, between: int = 2) -> list[Case]:
    """Return cases in an order for several processes: FlexAttention, whose compilations take long, comes later.

    Parameters
    ----------
    cases
        As a grid returns them.
    first
        Number of others with which a run begins.
    between
        Number of others after each one with FlexAttention from there on.
    """
    cases = list(cases)
    slow, others = [c for c in cases if c.flex], [c for c in cases if not c.flex]
    order, rest = others[:first], others[first:]
    while slow:
        order += [slow.pop(0), *rest[:between]]
        rest = rest[between:]
    return order + rest
