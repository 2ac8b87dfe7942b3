"""The seed library's table: kernels by hand on a ring's own pieces, shares of turns, and what targets say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import attnplan
from attnplan import AttentionSpec
from bench import seed_table, targets


def test_kernels_by_hand_are_those_of_the_ring_on_its_pieces() -> None:
    q, k, v = torch.randn(3, 1, 1, 64, 8).unbind()
    for strategy, launches in (("contiguous > all-gather", 4), ("contiguous > halo", 8), ("contiguous > ring", 16)):
        spec = AttentionSpec(seq_len=64, heads=1, head_dim=8, dtype="float32", ring_size=4)
        plan = attnplan.compile(spec, device="cpu", strategy=strategy)
        with seed_table.ByHand() as kernels:
            plan(q, k, v)
        assert len(kernels.calls) == launches, strategy
        assert {args[0].shape[-2] for _, args, _ in kernels.calls} == {16}
        kernels.run()
        assert len(kernels.calls) == launches, "they are called again outside of it"


def row(kernel: str, ring: int, **fields: Any) -> dict[str, Any]:
    return {"name": "a", "tokens": 4096, "ring": ring, "kernel": kernel, "working": 10 * ring, "seconds": 1.0, **fields}


def test_a_ring_is_compared_with_ring_1_of_the_same_turns() -> None:
    found = [
        row("planned", 1),
        row("planned", 16, seconds=3.0, ring_1=2.0, kernels=2.2, launches=32),
        row("gathered", 16, seconds=2.4, ring_1=2.0, kernels=2.1, launches=16),
    ]
    seed_table.compared(found)
    assert [r["time_share"] for r in found] == [1.0, 1.5, 1.2]
    assert found[1]["kernels_share"] == 1.1
    assert found[2]["working_share"] == 16, "of the planned row, which is what ring 1 runs on"


def test_the_target_stays_and_its_remark_says_what_the_kernels_take(tmp_path: Path) -> None:
    slow = row("planned", 16, time_share=1.5, kernels_share=1.125, launches=32, working_share=2.0)
    (tmp_path / "seed-table-cpu.json").write_text(json.dumps({"rows": [slow]}), encoding="utf-8")
    found = {t.what: t for t in targets.rings_on_one_device(targets.Results(tmp_path), "CPU")}
    judged = found["CPU, flash kernels: time of ring 16 over ring 1"]
    assert (judged.met, judged.limit, judged.figure) == (False, "<= 1.1", "1.50")
    assert "its 32 kernels, by hand on the same pieces, alone: 1.12" in judged.note
    assert found["CPU, flash kernels, all keys gathered: time of ring 16 over ring 1"].met is None


def test_rows_of_other_kernels_are_kept() -> None:
    kept = [row(kernel, 1) for kernel in seed_table.KERNELS]
    assert seed_table.measure("cpu", "float32", 1, 600.0, 1, lambda found: None, kept) == kept
