"""Pieces whose kernels and joins write where the rows of the whole are, on the CPU."""

from __future__ import annotations

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.backends.eager import programs
from attnplan.runtime import attend as attends
from attnplan.runtime import destinations, loops
from attnplan.runtime.kernels import KERNELS, FlashCPU
from bench.memory import call_of, measured
from tests.fused_cases import (
    SPECS,
    interpreted,  # noqa: F401  # a fixture
    plan_of,
)
from tests.running import TOLERANCES, Call, assert_agree
from tests.test_chunk import every_plan, looped
from tests.test_fused_written import Writing

DENSE = AttentionSpec(seq_len=48, heads=4, kv_heads=2, head_dim=8, dtype="float32", causal=True)


@pytest.fixture
def copies(monkeypatch):
    """Let the CPU kernel write, into wholes full of NaN; return which results of pieces were copied: their sizes."""
    monkeypatch.setitem(KERNELS, "flash-cpu", Writing())
    monkeypatch.setattr(attends, "WRITES_INTO", frozenset({"flash-cpu"}))
    new, found = loops.empty_like_rows, []
    monkeypatch.setattr(loops, "empty_like_rows", lambda *args: new(*args).fill_(torch.nan))

    def put(target, result):
        if not destinations.is_there(target, result):
            found.append(tuple(target.shape))
            target.copy_(result)

    monkeypatch.setattr(loops, "put", put)
    return found


def dense(spec, schedule="flash"):
    return next(p for p in every_plan(spec) if (p.backend, p.schedule, p.strategy) == ("eager", schedule, "dense"))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    "options", [{}, {"kv_len": 60, "causal": False}, {"seq_len": 64, "kv_len": 48, "causal": False}]
)
def test_a_kernel_writes_the_rows_and_gradients_of_its_heads(options, layout, copies):
    spec = attrs.evolve(DENSE, layout=layout, **{"kv_len": options.get("seq_len", 48), **options})
    call = Call.of(spec, batch=2, through_lse=False)
    assert_agree(call.got(looped(dense(spec), (1, 1, spec.seq_len), None)), call.expected(), TOLERANCES["float32"], "")
    assert not copies


def test_gradients_through_the_lse_are_copied(copies):
    call = Call.of(DENSE, batch=2)
    assert_agree(call.got(looped(dense(DENSE), (1, 1, 48), None)), call.expected(), TOLERANCES["float32"], "lse")
    assert len(copies) == 3 * 4, "dq, dk and dv of two heads of two batch elements; the output never"


def test_keys_of_several_pieces_are_summed(copies):
    call = Call.of(DENSE, batch=2, through_lse=False)
    assert_agree(call.got(looped(dense(DENSE), (2, 1, 20), None)), call.expected(), TOLERANCES["float32"], "rows")
    merged = [shape for shape in copies if shape[2] == 20]
    assert merged, "the second piece of a head joins two attends in plain torch"


def test_keys_that_nobody_sees_get_zeros(copies):
    spec = AttentionSpec(
        seq_len=16, kv_len=64, heads=2, head_dim=8, dtype="float32", pattern=P.window(8) & P.causal(), q_offset=False
    )
    call = Call.of(spec, batch=1, through_lse=False)
    plan = looped(dense(spec), (1, 1, 16), None)
    assert any(part.keys != (0, 64) for part in plan.program.parts)
    assert_agree(call.got(plan), call.expected(), TOLERANCES["float32"], "keys")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["longnet", "grouped", pytest.param("ragged", marks=pytest.mark.slow), "mean"])
@pytest.mark.parametrize("writes", [True, False])
def test_joins_write_where_the_rows_are(name, writes, copies, monkeypatch):
    if not writes:
        monkeypatch.setitem(KERNELS, "flash-cpu", FlashCPU())
        monkeypatch.setattr(attends, "WRITES_INTO", frozenset())
    spec = attrs.evolve(SPECS[name], dtype="float32", layout="bhsd" if len(name) % 2 else "bshd")
    call = Call.of(spec, batch=2, through_lse=False)
    plan = looped(plan_of(spec, "views"), (1, 2, spec.seq_len), None)
    assert_agree(call.got(plan), call.expected(), TOLERANCES["float32"], name)
    assert not copies


@pytest.mark.usefixtures("interpreted")
def test_rows_of_a_mixture_are_joined_piece_by_piece(copies):
    spec = attrs.evolve(SPECS["longnet"], dtype="float32")
    call = Call.of(spec, batch=2, through_lse=False)
    assert_agree(call.got(looped(plan_of(spec, "views"), (1, 4, 24), None)), call.expected(), TOLERANCES["float32"], "")
    assert not copies


@pytest.mark.usefixtures("interpreted")
def test_a_forward_that_runs_again_is_told_nothing(copies, monkeypatch):
    spec = attrs.evolve(SPECS["mean"], dtype="float32")
    call, run, told = Call.of(spec, batch=2, through_lse=False), programs.run, []

    def spied(module, *args):
        told.append((type(module).__name__, any(isinstance(x, dict) and destinations.INTO in x for x in args)))
        return run(module, *args)

    monkeypatch.setattr(programs, "run", spied)
    call.got(looped(plan_of(spec, "views"), (2, 4, 64), None))
    assert told == [("Forward", True), ("Forward", False), ("Backward", True)]
    assert not copies


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pattern", [P.full(), P.window(256), P.longnet([256, 1024], [1, 4])], ids=repr)
def test_pieces_on_cuda_agree_with_the_whole_and_keep_to_the_budget(pattern, training):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spec = AttentionSpec(
        seq_len=8192, heads=8, head_dim=64, dtype="bfloat16", causal=True, pattern=pattern, training=training
    )
    free = attnplan.compile(spec, device="cuda")
    try:
        tight = attnplan.compile(spec, device="cuda", max_memory=int(free.predicted.peak_bytes * 0.6))
    except attnplan.errors.MemoryBudgetError as error:
        pytest.skip(f"the kernels that are here need their room: {error}")
    want, got = call_of(free, "cuda")(), call_of(tight, "cuda")()
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert measured(call_of(tight, "cuda"), "cuda").allocated <= tight.predicted.peak_bytes
