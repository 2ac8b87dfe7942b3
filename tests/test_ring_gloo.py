"""Rings of processes over gloo: the virtual ring's numbers bit for bit, and exactly the planned bytes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnplan import AttentionSpec
from attnplan.errors import RingError
from attnplan.ring.build import programs
from attnplan.ring.layouts import LAYOUTS
from attnplan.ring.transports import TRANSPORTS
from tests.ring_group import run_group, values
from tests.ring_workers import CULPRIT, RANKS, beside_virtual, counted_on_the_wire, surface, wrong_shape
from tests.test_ring_virtual import PATTERNS

NONE: dict[str, Any] = {}


def spec_of(name: str, length: int = 37, kv_heads: int = 4, **fields: Any) -> AttentionSpec:
    pattern, causal = PATTERNS[name]
    sizes = {"seq_len": length, "heads": 4, "kv_heads": kv_heads, "head_dim": 8, **fields}
    return AttentionSpec(dtype="float32", pattern=pattern, causal=causal, **sizes)


def accepted(spec: AttentionSpec, ranks: int | tuple[int, int], layout: str, transport: str) -> bool:
    try:
        programs(spec, ranks, layout, transport)
    except RingError:
        return False
    return True


def cases(sizes: tuple[int, ...], names: Any, kv_heads: int) -> list[tuple[AttentionSpec, str, dict[str, Any]]]:
    found = []
    ranks: Any = sizes if len(sizes) == 2 else sizes[0]
    for name, layout, transport in itertools.product(names, LAYOUTS, TRANSPORTS):
        spec = spec_of(name, kv_heads=kv_heads)
        if (transport == "hybrid") != (len(sizes) == 2):
            continue
        if accepted(spec, ranks, layout, transport):
            found.append((spec, f"{layout} > {transport}", NONE))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_sample(ranks: int) -> None:
    every = cases((ranks,), ("causal", "window", "longnet", "grouped mean"), 1)
    chosen = every[ranks // 2 :: 12 if ranks == 4 else 9]
    chosen.append((spec_of("longnet", layout="bshd"), "zigzag > rows", NONE))
    assert {s.split(" > ")[1] for _, s, _ in every} >= {"halo", "ring", "all-gather", "ulysses", "rows"}
    assert values(run_group(ranks, beside_virtual, (ranks,), chosen)) == [len(chosen)] * ranks


def test_sample_of_a_mesh_of_two_dimensions() -> None:
    chosen = cases((2, 2), ("causal", "sinks"), 2)[::3]
    assert values(run_group(4, beside_virtual, (2, 2), chosen)) == [len(chosen)] * 4


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("sizes", [(2,), (4,), (8,), (2, 2), (4, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_everything(name: str, sizes: tuple[int, ...], kv_heads: int) -> None:
    chosen = cases(sizes, [name], kv_heads)
    count = len(chosen)
    ranks = sizes[0] * (sizes[1] if len(sizes) == 2 else 1)
    assert count
    assert values(run_group(ranks, beside_virtual, sizes, chosen, deadline=150.0)) == [count] * ranks


def test_the_surface_of_a_plan_on_a_mesh() -> None:
    values(run_group(2, surface))


def test_a_shard_of_a_wrong_length_is_named_on_every_rank() -> None:
    found = run_group(RANKS, wrong_shape)
    assert found[CULPRIT].error.startswith("SpecError: q has shape [1, 2, 5, 8], this rank's shard needs [B, 2, 4, 8]")
    for one in found:
        if one.rank != CULPRIT:
            assert f"RingError: rank {one.rank}, step 1, handshake: rank 2 was called with tensors" in one.error


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_operands_are_of_the_whole_sequence(ranks: int) -> None:
    from attnplan import patterns as P

    spec = AttentionSpec(
        seq_len=29, heads=2, head_dim=8, causal=True, dtype="float32", pattern=P.documents() & P.padding()
    )
    operands = {
        "documents": torch.tensor([[0, 9, 10, 29], [0, 0, 18, 29]], dtype=torch.int32),
        "key_padding": torch.arange(29) < torch.tensor([[29], [21]]),
    }
    dropped = AttentionSpec(seq_len=29, heads=2, head_dim=8, causal=True, dtype="float32", dropout=0.25)
    seed = {"dropout_seed": torch.tensor(5)}
    chosen = [(spec, "zigzag > ring", operands), (dropped, "striped > all-gather", seed)]
    assert values(run_group(ranks, beside_virtual, (ranks,), chosen, deadline=150.0)) == [2] * ranks


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zigzag > ring", "contiguous > all-gather", "contiguous > ulysses"])
def test_bytes_on_the_loopback_interface(strategy: str) -> None:
    found = values(run_group(RANKS, counted_on_the_wire, strategy))
    ours = sum(sent for _, sent in found)
    wire = max(seen for seen, _ in found)
    assert ours > 2**25
    assert ours <= wire <= 1.03 * ours, (wire, ours)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["auto", "zigzag"])
def test_the_example_as_a_user_starts_it(layout: str) -> None:
    """The losses of the sharded model are those of the model alone, or the example itself fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/ring_torchrun.py"]
    options = ["--check", "--steps", "3", "--layout", layout]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [*command, *options], cwd=root, check=True, capture_output=True, text=True, timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "step 2" in done.stdout
    assert "alone" in done.stdout
