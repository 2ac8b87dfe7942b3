"""Kernels of other packages: called directly in plain eager, behind a registered operator when somebody looks on.

A Python custom operator costs tens of microseconds, so plain eager does without. Under ``torch.compile``, selective
checkpointing, or any other dispatch mode the call goes through ``attnplan::<family>_forward``, which such a mode can
see, save, and count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnplan.errors import AttnPlanError, KernelError
from attnplan.ir.native import Window
from attnplan.runtime.kernels import KERNELS, PLAIN, Native
from attnplan.runtime.tables import BlockLists, Lists
from attnplan.runtime.views import with_features_in_line


def is_watched() -> bool:
    """Return whether a compiler or a dispatch mode sees the operators that are called now."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


class Opaque:
    """A kernel of another package. Subclasses say how it is called, in ``run`` and ``run_backward``."""

    family: str
    title: str
    widest: int
    groups = True

    def __init__(self, name: str) -> None:
        self.name = name

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, native: Native
    ) -> tuple[Tensor, Tensor]:
        """Call the forward kernel."""
        raise NotImplementedError

    def run_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        native: Native,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call the backward kernel."""
        raise NotImplementedError

    def run_direct(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, native: Native) -> Tensor:
        """Call the package's own differentiable function."""
        raise NotImplementedError

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        scale: float,
        native: Native = PLAIN,
    ) -> tuple[Tensor, Tensor]:
        """Return output and LSE."""
        if is_watched():
            forward = getattr(torch.ops.attnplan, f"{self.family}_forward")
            return forward(q, k, v, *_flat(self.name, mask, causal, scale, native))  # type: ignore[no-any-return]
        try:
            return self.run(q, k, v, mask, causal, scale, native)
        except Exception as error:  # kernels of other packages raise whatever they like
            self._report(error, "forward", (q, k, v))

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        scale: float,
        native: Native = PLAIN,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""
        if is_watched():
            backward = getattr(torch.ops.attnplan, f"{self.family}_backward")
            flat = _flat(self.name, mask, causal, scale, native)
            return backward(grad, q, k, v, out, lse, *flat)  # type: ignore[no-any-return]
        try:
            return self.run_backward(grad, q, k, v, out, lse, mask, causal, scale, native)
        except Exception as error:  # kernels of other packages raise whatever they like
            self._report(error, "backward", (q, k, v))

    def direct(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, native: Native) -> Tensor:
        """Return the output of a call that the package itself, or the registered operator, differentiates."""
        if is_watched():
            forward = getattr(torch.ops.attnplan, f"{self.family}_forward")
            return forward(q, k, v, *_flat(self.name, None, causal, scale, native))[0]  # type: ignore[no-any-return]
        try:
            return self.run_direct(q, k, v, causal, scale, native)
        except Exception as error:  # kernels of other packages raise whatever they like
            self._report(error, "forward", (q, k, v))

    def _report(self, error: Exception, what: str, given: tuple[Tensor, ...]) -> NoReturn:
        if isinstance(error, AttnPlanError | torch.OutOfMemoryError):
            raise error
        shapes = ", ".join(f"{n} {list(x.shape)}" for n, x in zip("qkv", given, strict=True))
        raise KernelError(
            f"{self.title} ({self.name}) failed in its {what} on {shapes} {given[0].dtype} {given[0].device}: "
            f"{type(error).__name__}: {error}"
        ) from error


Flat = tuple[Tensor | None, Tensor | None, list[Tensor], str, bool, list[int], float, float]
"""(mask, documents, block lists, kernel, causal, [left, right, tile queries, tile keys], scale, softcap)."""


def _flat(name: str, mask: Tensor | None, causal: bool, scale: float, native: Native) -> Flat:
    window = [-1 if n is None else n for n in native.window]
    blocks, tile = native.blocks, [0, 0]
    tensors: list[Tensor] = []
    if blocks is not None:
        tile = list(blocks.tile)
        for x in (blocks.rows, blocks.columns):
            tensors += [x.partial_count, x.partial_index, x.full_count, x.full_index]
    return mask, native.documents, tensors, name, causal, window + tile, scale, native.softcap


def _native(documents: Tensor | None, blocks: Sequence[Tensor], sizes: Sequence[int], softcap: float) -> Native:
    left, right, tall, wide = sizes
    window: Window = (None if left < 0 else left, None if right < 0 else right)
    made = BlockLists((tall, wide), Lists(*blocks[:4]), Lists(*blocks[4:])) if blocks else None
    return Native(window, softcap, documents, made)


def laid_out(x: Tensor) -> Tensor:
    """Return ``[N, M, R, D]`` whose rows lie in memory as ``[N, R, M, D]``, as the registered operators promise."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    blocks: Sequence[Tensor],
    kernel: str,
    causal: bool,
    sizes: Sequence[int],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    one = KERNELS[kernel]
    assert isinstance(one, Opaque)
    try:
        out, lse = one.run(q, k, v, mask, causal, scale, _native(documents, blocks, sizes, softcap))
    except Exception as error:  # kernels of other packages raise whatever they like
        one._report(error, "forward", (q, k, v))
    return laid_out(out), lse.contiguous()


def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    blocks: Sequence[Tensor],
    kernel: str,
    causal: bool,
    sizes: Sequence[int],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    one = KERNELS[kernel]
    assert isinstance(one, Opaque)
    native = _native(documents, blocks, sizes, softcap)
    grad = with_features_in_line(grad)
    try:
        dq, dk, dv = one.run_backward(grad, q, k, v, out, lse, mask, causal, scale, native)
    except Exception as error:  # kernels of other packages raise whatever they like
        one._report(error, "backward", (q, k, v))
    return laid_out(dq), laid_out(dk), laid_out(dv)


def _like(x: Tensor, features: int) -> Tensor:
    n, m, r = x.shape[:3]
    return x.new_empty((n, r, m, features)).transpose(1, 2)


def _register(family: str) -> Callable[..., Any]:
    """Register ``attnplan::<family>_forward`` and ``_backward``, with their fakes and their autograd."""
    forward = torch.library.custom_op(f"attnplan::{family}_forward", _run_forward, mutates_args=())
    backward = torch.library.custom_op(f"attnplan::{family}_backward", _run_backward, mutates_args=())

    def fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return _like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)

    def fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _like(q, q.shape[-1]), _like(k, k.shape[-1]), _like(v, v.shape[-1])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, mask, documents, blocks, *ctx.rest = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, mask, documents, *blocks)

    def differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, mask, documents, *blocks = ctx.saved_tensors
        nothing = (None, None, [None] * len(blocks), *(None for _ in ctx.rest))
        if grad is None:
            return None, None, None, *nothing
        return *backward(grad, q, k, v, out, lse, mask, documents, blocks, *ctx.rest), *nothing

    forward.register_fake(fake_forward)
    backward.register_fake(fake_backward)
    forward.register_autograd(differentiate, setup_context=setup)
    return forward


FAMILIES = {family: _register(family) for family in ("flash", "xformers")}
