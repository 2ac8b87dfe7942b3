"""Modules in float32 and bfloat16 against float64 implementations in tests/published.py.

The float64 grids are in test_nn_dilated.py, test_nn_longnet.py, test_nn_ring.py and test_nn_multihead.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.modules import ATTENTIONS, PROJECTED, Case, E, noise, nudged, tensor_of
from tests.running import TOLERANCES, error

BFLOAT16_OUTPUT = 4e-3
BFLOAT16_GRADIENT_RATIO = 1.5
BFLOAT16_PROJECTED_RATIO = 1.05
"""Projections in bfloat16 alone err by up to 4.6e-3 here, so that output is held to the same around dense SDPA."""
N, D = 125, 16  # no multiple of a segment
Named = dict[str, Tensor]

every_attention = pytest.mark.parametrize("name", ATTENTIONS)
every_projected = pytest.mark.parametrize("name", PROJECTED)
grouped_queries = pytest.mark.parametrize(("heads", "kv_heads"), [(5, 5), (6, 2)])
causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])


def leaves_of(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


def numbers(out: Tensor, leaves: Named, upstream: Tensor) -> Named:
    """Return the output and the gradients of the leaves."""
    grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
    return {"output": out.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def qkv(heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    return [noise((2, N, h, D), i, dtype) for i, h in enumerate((heads, kv_heads, kv_heads))]


def ours_and_exact(case: Case, tensors: Sequence[Tensor], causal: bool, upstream: Tensor) -> tuple[Named, Named]:
    """Run a class without projections in the dtype of ``tensors``, and its mathematics in float64."""
    module, found = case.build(), []
    for run, dtype in (
        (lambda *x: module(*x, is_causal=causal), tensors[0].dtype),
        (lambda *x: case.expected({}, x, causal), torch.float64),
    ):
        x = leaves_of(tensors, dtype)
        found.append(numbers(run(*x), dict(zip("qkv", x, strict=True)), upstream))
    assert found[0]["output"].dtype is tensors[0].dtype
    return found[0], found[1]


@causal_or_not
@grouped_queries
@every_attention
def test_float32(name: str, heads: int, kv_heads: int, causal: bool) -> None:
    x, upstream = qkv(heads, kv_heads, torch.float32), noise((2, N, heads, D), 7, torch.float32)
    got, want = ours_and_exact(ATTENTIONS[name], x, causal, upstream)
    for what in want:
        assert error(got[what], want[what]) <= TOLERANCES["float32"], what


@causal_or_not
@grouped_queries
@every_attention
def test_bfloat16(name: str, heads: int, kv_heads: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case, x = ATTENTIONS[name], qkv(heads, kv_heads, torch.bfloat16)
    upstream = noise((2, N, heads, D), 7, torch.bfloat16)
    got, want = ours_and_exact(case, x, causal, upstream)
    assert error(got["output"], want["output"]) <= BFLOAT16_OUTPUT
    leaves = leaves_of(x, torch.bfloat16)
    out = case.anchor(monkeypatch, {}, tuple(leaves), causal)
    assert_gradients_near(got, numbers(out, dict(zip("qkv", leaves, strict=True)), upstream), want)


def assert_gradients_near(got: Named, anchor: Named, want: Named) -> None:
    for what in want:
        if what != "output":
            ratio = error(got[what], want[what]) / error(anchor[what], want[what])
            assert ratio <= BFLOAT16_GRADIENT_RATIO, f"{what} errs {ratio:.2f} times as much as with SDPA"


def projected(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    return nudged(PROJECTED[name].build()).to(dtype), [noise((2, N, E), i, dtype) for i in range(3)]


def through(run: Callable[..., object], module: nn.Module, x: Sequence[Tensor], dtype: torch.dtype) -> Named:
    """Run ``run(state, x)`` on copies of the module's parameters and of ``x`` in ``dtype``."""
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    state = dict(zip(trained, leaves_of([*trained.values()], dtype), strict=True))
    inputs = leaves_of(x, dtype)
    out = tensor_of(run(state, tuple(inputs)))
    assert out.dtype is dtype
    return numbers(out, {**dict(zip("qkv", inputs, strict=True)), **state}, noise((2, N, E), 7, torch.bfloat16))


def module_and_exact(name: str, dtype: torch.dtype, causal: bool) -> tuple[nn.Module, list[Tensor], Named, Named]:
    module, x = projected(name, dtype)
    got = through(lambda s, t: functional_call(module, s, t, {"is_causal": causal}), module, x, dtype)
    want = through(lambda s, t: PROJECTED[name].expected(s, t, causal), module, x, torch.float64)
    return module, x, got, want


@causal_or_not
@every_projected
def test_float32_with_projections(name: str, causal: bool) -> None:
    _, _, got, want = module_and_exact(name, torch.float32, causal)
    for what in want:
        vanishes = float(want[what].norm()) < 1e-9  # the last bias of k: a sum of dk over rows that is 0
        floor = float(want["dk"].norm()) if vanishes else 0.0
        assert error(got[what], want[what], floor) <= TOLERANCES["float32"], what


@causal_or_not
@every_projected
def test_bfloat16_with_projections(name: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, got, want = module_and_exact(name, torch.bfloat16, causal)
    anchor = through(lambda s, t: PROJECTED[name].anchor(monkeypatch, s, t, causal), module, x, torch.bfloat16)
    worst = max(BFLOAT16_OUTPUT, BFLOAT16_PROJECTED_RATIO * error(anchor["output"], want["output"]))
    assert error(got["output"], want["output"]) <= worst
    assert_gradients_near(got, anchor, want)
