"""Kernels that are started again without the host code that found them: Triton's, and those of flash-attn 4."""

from __future__ import annotations

import gc
import weakref
from types import ModuleType, SimpleNamespace

import attrs
import pytest
import torch

from attnplan.runtime.fused.launching import Launcher
from attnplan.runtime.fused.replay import BackwardReplay, Replay, backward_replay_of
from attnplan.runtime.kernels import Request
from attnplan.runtime.tables import BlockLists, Lists, RowBounds
from tests.running import error


def options(asked):
    return {"softmax_scale": asked.scale, "causal": asked.causal}


def test_what_is_compiled_is_started_again_without_triton():
    """Only for the same numbers, grid and alignment."""
    bound, started = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: started.append((grid, args))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, num_warps: bound.append((grid, args)) or Compiled()

    start, cpu = Launcher(Kernel), torch.device("cpu")
    for grid, key, pointers in (((1, 1, 1), "a", 64), ((1, 1, 1), "b", 64), ((2, 1, 1), "a", 64), ((1, 1, 1), "a", 72)):
        start(grid, key, cpu, pointers, key)
    assert [(g, a) for g, a in bound] == [
        ((1, 1, 1), ("a",)),
        ((1, 1, 1), ("b",)),
        ((2, 1, 1), ("a",)),
        ((1, 1, 1), ("a",)),
    ]
    assert not started
    start((1, 1, 1), "b", cpu, 128, "b")
    start((1, 1, 1), "a", cpu, 128, "a")
    assert started == [((1, 1, 1), ("b",)), ((1, 1, 1), ("a",))]


class Interface:
    """Stands for flash-attn 4: looks its kernel up in a table, and calls it."""

    def __init__(self, *, kernels=1):
        self.kernels, self.entered, self.ran = kernels, 0, []

        def kernel(q, k, v, out, lse, scale, *rest):
            self.ran.append((q.shape, scale, rest))
            scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
            if rest[-1]:
                scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
            out.copy_(torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v))
            lse.copy_(scores.logsumexp(-1))

        def forward(q, k, v, *, softmax_scale, causal, out, lse, return_lse):
            self.entered += 1
            assert 0 not in out.stride(), "out must not have broadcast dimensions"
            for _ in range(self.kernels):
                forward.compile_cache[causal](q.detach(), k, v, out, lse, softmax_scale, None, (None, None), causal)

        forward.compile_cache = {False: kernel, True: kernel}
        self.forward = forward


@pytest.mark.parametrize("kernels", [1, 2])
def test_flash_attention_4_is_started_again_without_its_host_code(kernels):
    """A call of two kernels is none that can be replayed: the interface is called each time."""
    interface = Interface(kernels=kernels)
    table, replay = interface.forward.compile_cache, Replay(interface.forward, options)
    for turn in range(3):
        for causal in (False, True):
            q, k, v = (torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(turn + i)) for i in range(3))
            out, lse = replay(q, k, v, Request(0.3, causal))
            heads = [x.transpose(1, 2) for x in (q, k, v)]
            want = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal, scale=0.3)
            assert error(out.transpose(1, 2), want.double()) < 1e-6
            assert lse.shape == (2, 3, 5)
    assert interface.forward.compile_cache is table
    assert interface.entered == (2 if kernels == 1 else 6)
    wide = torch.randn(2, 3, 5, 8).transpose(1, 2)
    replay(wide, wide, wide, Request(0.3, True))
    assert interface.entered == (3 if kernels == 1 else 7), "other strides are another call"
    whole = torch.full((2, 10, 3, 8), torch.nan)
    for turn in range(2):
        out, _ = replay(wide * turn, wide, wide, Request(0.3, True), whole[:, turn::2])
        assert torch.equal(whole[:, turn::2], out), "it is written where it is told"
    assert interface.entered == (4 if kernels == 1 else 9), "the strides of the output count, its place does not"
    one = torch.full((4, 5, 8), torch.nan).as_strided((1, 5, 1, 8), (0, 8, 0, 1), 40)
    out, _ = replay(*[wide[:1, :, :1]] * 3, Request(0.3, True), one)
    assert torch.equal(one, out), "a dimension of size 1 is no broadcast"
    assert out.data_ptr() == one.data_ptr()


def interface_of_backward(*, copies=False, extra=False):
    """Stand for the backward of flash-attn 4: three kernels looked up in three tables, and buffers between them."""
    entered = []

    def pre(out, grad, delta, lse, lse_base_2, total, *rest):
        delta.copy_((out.double() * grad.double()).sum(-1).transpose(1, 2))
        lse_base_2.copy_(lse * 1.4426950408889634)
        total.zero_()

    def main(q, k, v, grad, lse_base_2, delta, total, dk, dv, scale, causal, *rest):
        scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
        weights = torch.exp2(scores * 1.4426950408889634 - lse_base_2.unsqueeze(-1))
        if causal:
            weights = weights.tril()
        dv.copy_(torch.einsum("bhst,bshd->bthd", weights, grad))
        slope = weights * (torch.einsum("bshd,bthd->bhst", grad, v) - delta.unsqueeze(-1)) * scale
        dk.copy_(torch.einsum("bhst,bshd->bthd", slope, q))
        total.add_(torch.einsum("bhst,bthd->bshd", slope, k).transpose(1, 2).reshape(total.shape))

    def post(total, dq, *rest):
        batch, length, heads, features = dq.shape
        dq.copy_(total.view(batch, heads, length, features).transpose(1, 2))

    made = SimpleNamespace(entered=entered)

    def backward(q, k, v, out, dout, lse, softmax_scale, causal, softcap=0.0, *, dq, dk, dv):
        entered.append(causal)
        assert all(0 not in x.stride() for x in (dq, dk, dv)), "outputs must not have broadcast dimensions"
        batch, length, heads, features = q.shape
        total = q.new_full((batch, heads, length * features), torch.nan)
        delta, lse_base_2 = (q.new_full((batch, heads, length), torch.nan) for _ in range(2))
        first = (out, dout, delta, lse, lse_base_2, total, None, 1.0)
        made._bwd_preprocess.compile_cache[0](*first)
        if copies:
            k = k.clone()
        given = (q.detach(), k, v, dout, lse_base_2, delta, total, dk, dv, softmax_scale, causal)
        backward.compile_cache[causal](*given, (None, None), total if extra else None)
        made._bwd_postprocess_convert.compile_cache[0](total, dq, softmax_scale, None)
        return dq, dk, dv

    backward.compile_cache = {False: main, True: main}
    made._flash_attn_bwd = backward
    made._bwd_preprocess = SimpleNamespace(compile_cache={0: pre})
    made._bwd_postprocess_convert = SimpleNamespace(compile_cache={0: post})
    return made


@pytest.mark.parametrize("case", ["replayed", "a step works on a copy", "another tensor is in a call"])
def test_the_backward_of_flash_attention_4_is_started_again_without_its_host_code(case):
    """Its buffers are made anew in each call; what is not three calls on exactly these tensors enters the interface."""
    replayed = case == "replayed"
    interface = interface_of_backward(copies=case.endswith("copy"), extra=case.endswith("call"))
    steps = (interface._bwd_preprocess, interface._flash_attn_bwd, interface._bwd_postprocess_convert)
    tables, replay = [s.compile_cache for s in steps], BackwardReplay(interface, options)
    for turn in range(3):
        for causal in (False, True):
            draw = torch.Generator().manual_seed(2 * turn + causal)
            q, k, v, grad = (torch.randn(2, 5, 3, 8, generator=draw) for _ in range(4))
            leaves = [x.double().requires_grad_() for x in (q, k, v)]
            scores = torch.einsum("bshd,bthd->bhst", *leaves[:2]) * 0.3
            if causal:
                scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
            out = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), leaves[2])
            want = torch.autograd.grad(out, leaves, grad.double())
            lse = scores.logsumexp(-1).detach().float()
            got = replay(q, k, v, out.detach().float(), grad, lse, Request(0.3, causal))
            for x, y in zip(got, want, strict=True):
                assert error(x, y) < 1e-5
    assert [s.compile_cache for s in steps] == tables
    assert len(interface.entered) == (2 if replayed else 6)
    wide = torch.randn(2, 5, 3, 8).transpose(1, 2).contiguous().transpose(1, 2)
    made = replay(wide, wide, wide, wide, wide, torch.zeros(2, 3, 5), Request(0.3, True))
    assert len(interface.entered) == (3 if replayed else 7), "other strides are another call"
    assert all(x.stride() == wide.stride() for x in made), "gradients lie as their tensors do"
    whole = torch.full((2, 10, 3, 8), torch.nan)
    told = replay(wide, wide, wide, wide, wide, torch.zeros(2, 3, 5), Request(0.3, True), (None, whole[:, 1::2], None))
    assert torch.equal(whole[:, 1::2], made[1])
    assert told[1].data_ptr() == whole[:, 1::2].data_ptr()
    assert torch.equal(told[0], made[0])
    one = torch.full((4, 5, 8), torch.nan).as_strided((1, 5, 1, 8), (0, 8, 0, 1), 40)
    told = replay(*[wide[:1, :, :1]] * 5, torch.zeros(1, 1, 5), Request(0.3, True), (one, None, None))
    assert torch.equal(one, told[0])
    assert not one.isnan().any(), "a dimension of size 1 is no broadcast"


def test_tables_are_held_beside_what_is_found_by_their_identities():
    """Even those that the kernel got in another form: else other tables could come to their addresses."""
    forward, backward = Interface(), interface_of_backward()
    replay, replay_backward = Replay(forward.forward, options), BackwardReplay(backward, options)
    x, lse, seen = torch.zeros(1, 5, 1, 8), torch.zeros(1, 1, 5), []
    for turn in range(2):
        rows, columns = (Lists(*(torch.zeros(1, 1, 1, dtype=torch.int32) for _ in range(4))) for _ in range(2))
        masks = RowBounds(torch.zeros(5, 4, dtype=torch.int32))
        for _ in range(2):
            replay(x, x, x, Request(0.3, blocks=BlockLists((8, 8), rows, columns, masks)))
            replay_backward(x, x, x, x, x, lse, Request(0.3, blocks=BlockLists((8, 8), rows, columns)))
        assert forward.entered == len(backward.entered) == turn + 1
        held = [masks.bounds, *(getattr(y, f.name) for y in (rows, columns) for f in attrs.fields(Lists))]
        seen += map(weakref.ref, held)
        del rows, columns, masks, held
    gc.collect()
    assert len(seen) == 18
    assert all(ref() is not None for ref in seen)
    del replay, replay_backward
    gc.collect()
    assert all(ref() is None for ref in seen)


def test_an_interface_without_these_steps_is_not_replayed():
    whole = ModuleType("interface")
    whole.__dict__.update(vars(interface_of_backward()))
    assert backward_replay_of(whole, options) is backward_replay_of(whole, options) is not None
    less = ModuleType("less")
    less._flash_attn_bwd = whole._flash_attn_bwd
    assert backward_replay_of(less, options) is None
