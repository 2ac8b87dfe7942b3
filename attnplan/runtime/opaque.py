"""Kernels of other packages: called directly in plain eager, behind a registered operator when somebody looks on.

A Python custom operator costs tens of microseconds, so plain eager does without. Under ``torch.compile``, selective
checkpointing, or any other dispatch mode the call goes through ``attnplan::<family>_forward``, which such a mode can
see, save, and count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from attnplan.errors import AttnPlanError, KernelError
from attnplan.ir.native import Window
from attnplan.runtime.kernels import KERNELS, Pair, Request, Triple
from attnplan.runtime.tables import BlockLists, Lists, RowBounds, TileMasks
from attnplan.runtime.views import rows_first, with_features_in_line

T = TypeVar("T")


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

    def run(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Pair:
        """Call the forward kernel."""
        raise NotImplementedError

    def run_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, asked: Request
    ) -> Triple:
        """Call the backward kernel."""
        raise NotImplementedError

    def run_direct(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Tensor:
        """Call the package's own differentiable function."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Pair:
        """Return output and LSE."""
        if is_watched():
            return self._registered("forward")(q, k, v, *_flat(self.name, asked))  # type: ignore[no-any-return]
        return self.reported("forward", self.run, q, k, v, asked)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, asked: Request
    ) -> Triple:
        """Return the gradients of q, k and v."""
        if is_watched():
            found: Triple = self._registered("backward")(grad, q, k, v, out, lse, *_flat(self.name, asked))
            return found
        return self.reported("backward", self.run_backward, grad, q, k, v, out, lse, asked)

    def direct(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Tensor:
        """Return the output of a call that the package itself, or the registered operator, differentiates."""
        if is_watched():
            return self._registered("forward")(q, k, v, *_flat(self.name, asked))[0]  # type: ignore[no-any-return]
        return self.reported("forward", self.run_direct, q, k, v, asked)

    def _registered(self, what: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(torch.ops.attnplan, f"{self.family}_{what}")
        return found

    def reported(self, what: str, run: Callable[..., T], *given: Any) -> T:
        """Return ``run(*given)``; what it raises is reported with the kernel and the shapes."""
        try:
            return run(*given)
        except Exception as error:  # kernels of other packages raise whatever they like
            self._report(error, what, given[:3] if what == "forward" else given[1:4])

    def _report(self, error: Exception, what: str, given: tuple[Tensor, ...]) -> NoReturn:
        if isinstance(error, AttnPlanError | torch.OutOfMemoryError):
            raise error
        shapes = ", ".join(f"{n} {list(x.shape)}" for n, x in zip("qkv", given, strict=True))
        raise KernelError(
            f"{self.title} ({self.name}) failed in its {what} on {shapes} {given[0].dtype} {given[0].device}: "
            f"{type(error).__name__}: {error}"
        ) from error


Flat = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, list[Tensor], str, bool, list[int], float, float
]
"""(mask, bias, documents, sinks, lists, kernel, causal, [left, right, tile queries, tile keys], scale, softcap)."""


def _flat(name: str, asked: Request) -> Flat:
    window = [-1 if n is None else n for n in asked.window]
    blocks, tile = asked.blocks, [0, 0]
    tensors: list[Tensor] = []
    if blocks is not None:
        tile = list(blocks.tile)
        for x in (blocks.rows, blocks.columns):
            tensors += [x.partial_count, x.partial_index, x.full_count, x.full_index]
        if isinstance(blocks.masks, TileMasks):
            tensors += [blocks.masks.places, blocks.masks.masks]
        elif blocks.masks is not None:
            tensors.append(blocks.masks.bounds)
    numbers = (window + tile, asked.scale, asked.softcap)
    return asked.mask, asked.bias, asked.documents, asked.sinks, tensors, name, asked.causal, *numbers


def _unflat(
    mask: Tensor | None,
    bias: Tensor | None,
    documents: Tensor | None,
    sinks: Tensor | None,
    blocks: Sequence[Tensor],
    kernel: str,
    causal: bool,
    sizes: Sequence[int],
    scale: float,
    softcap: float,
) -> tuple[Opaque, Request]:
    """Return the inverse of :func:`_flat`."""
    left, right, tall, wide = sizes
    window: Window = (None if left < 0 else left, None if right < 0 else right)
    masks: TileMasks | RowBounds | None = None
    if len(blocks) > 8:
        masks = RowBounds(blocks[8]) if len(blocks) == 9 else TileMasks(*blocks[8:])
    made = BlockLists((tall, wide), Lists(*blocks[:4]), Lists(*blocks[4:8]), masks) if blocks else None
    one = KERNELS[kernel]
    assert isinstance(one, Opaque)
    return one, Request(scale, causal, mask, bias, window, softcap, documents, made, sinks)


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    documents: Tensor | None,
    sinks: Tensor | None,
    blocks: Sequence[Tensor],
    kernel: str,
    causal: bool,
    sizes: Sequence[int],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    one, asked = _unflat(mask, bias, documents, sinks, blocks, kernel, causal, sizes, scale, softcap)
    out, lse = one.reported("forward", one.run, q, k, v, asked)
    return rows_first(out), lse.contiguous()


def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    documents: Tensor | None,
    sinks: Tensor | None,
    blocks: Sequence[Tensor],
    kernel: str,
    causal: bool,
    sizes: Sequence[int],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    one, asked = _unflat(mask, bias, documents, sinks, blocks, kernel, causal, sizes, scale, softcap)
    given = (with_features_in_line(grad), q, k, v, out, lse, asked)
    dq, dk, dv = one.reported("backward", one.run_backward, *given)
    return rows_first(dq), rows_first(dk), rows_first(dv)


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
        q, k, v, mask, bias, documents, sinks, blocks, *ctx.rest = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, mask, bias, documents, sinks, *blocks)

    def differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, mask, bias, documents, sinks, *blocks = ctx.saved_tensors
        nothing = (None, None, None, None, [None] * len(blocks), *(None for _ in ctx.rest))
        if grad is None:
            return None, None, None, *nothing
        return *backward(grad, q, k, v, out, lse, mask, bias, documents, sinks, blocks, *ctx.rest), *nothing

    forward.register_fake(fake_forward)
    backward.register_fake(fake_backward)
    forward.register_autograd(differentiate, setup_context=setup)
    return forward


FAMILIES = {family: _register(family) for family in ("flash", "xformers")}
