"""What rings are measured beside: a plain ring and an all-gather by hand, and torch's own context parallel.

All are causal. The first two hold contiguous shards, and wait for what a hop needs while the hop before computes; they
merge by log-sum-exp and accumulate gradients in float32. The third is what
``torch.distributed.tensor.experimental.context_parallel`` does with ``scaled_dot_product_attention``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnplan import AttentionSpec
from attnplan.runtime.kernels import KERNELS, Request


class Ring:
    """A ring over contiguous shards, written by hand, with the kernel that SDPA would take."""

    def __init__(self, group: Any, rank: int, ranks: int, spec: AttentionSpec, kind: str) -> None:
        import attnplan.runtime.kernels_all  # noqa: F401  # adds those for CUDA

        self.group, self.rank, self.ranks = group, rank, ranks
        self.kernel = KERNELS["cudnn" if kind == "cuda" else "flash-cpu"]
        self.scale, self.repeats = spec.softmax_scale, 1 if self.kernel.groups else spec.heads // spec.kv_heads

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = _Ring.apply(q, k, v, self)  # type: ignore[no-untyped-call]
        return found

    def hops(self, tensors: tuple[Tensor, ...]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Iterate over hops and the keys and values in them, the next on their way meanwhile."""
        for hop in range(self.ranks):
            received, works = self._passed_on(tensors) if hop < self.ranks - 1 else (tensors, [])
            yield hop, tensors
            for work in works:
                work.wait()
            tensors = received

    def _passed_on(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[Any]]:
        after, before = (self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks
        received = tuple(torch.empty_like(x) for x in tensors)
        operations = [dist.P2POp(dist.isend, x, group=self.group, group_peer=after) for x in tensors]
        operations += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=before) for x in received]
        return received, dist.batch_isend_irecv(operations)

    def wide(self, x: Tensor) -> Tensor:
        """Return keys as the kernel takes them."""
        return x.repeat_interleave(self.repeats, 1) if self.repeats > 1 else x

    def narrow(self, x: Tensor) -> Tensor:
        """Return the gradient of keys from that of what :meth:`wide` returned, in float32."""
        return x.float().unflatten(1, (-1, self.repeats)).sum(2) if self.repeats > 1 else x.float()


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        total: Tensor | None = None
        lse = q.new_empty(0)
        for hop, (keys, values) in ring.hops((k, v)):
            if hop > ring.rank:
                continue
            asked = Request(ring.scale, hop == 0)
            part, part_lse = ring.kernel.forward(q, ring.wide(keys), ring.wide(values), asked)
            if total is None:
                total, lse = part.float(), part_lse
                continue
            both = torch.logaddexp(lse, part_lse)
            total = total * torch.exp(lse - both).unsqueeze(-1) + part * torch.exp(part_lse - both).unsqueeze(-1)
            lse = both
        assert total is not None
        out = total.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        grad = grads[0].contiguous()
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        for hop, (keys, values) in ring.hops((k, v)):
            if hop <= ring.rank:
                asked = Request(ring.scale, hop == 0)
                pieces = ring.kernel.backward(grad, q, ring.wide(keys), ring.wide(values), out, lse, asked)
                dq += pieces[0]
                dk += ring.narrow(pieces[1])
                dv += ring.narrow(pieces[2])
            (dk, dv), works = ring._passed_on((dk, dv))  # the gradients follow their keys, and come home in the end
            for work in works:
                work.wait()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


class Gathered(Ring):
    """All keys gathered first, then attention of the own rows to those before them; forward only."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        found = []
        for x in (k, v):
            flat = x.new_empty(self.ranks * x.numel())
            gather(flat, x.reshape(-1), group=self.group)
            found.append(flat.view(self.ranks, *x.shape).permute(1, 2, 0, 3, 4).flatten(2, 3))
        out, lse = self.kernel.forward(q, self.wide(k), self.wide(v), Request(self.scale, True))
        if not self.rank:
            return out
        before = [self.wide(x[:, :, : self.rank * q.shape[2]]) for x in found]
        part, part_lse = self.kernel.forward(q, *before, Request(self.scale))
        both = torch.logaddexp(lse, part_lse)
        merged = out * torch.exp(lse - both).unsqueeze(-1) + part * torch.exp(part_lse - both).unsqueeze(-1)
        return merged.to(q.dtype)


@contextmanager
def torch_sharded(mesh: Any, tensors: list[Tensor], method: str, kind: str) -> Iterator[Callable[..., Tensor]]:
    """Shard whole q, k, v and the gradient in place as torch's context parallel does; yield its attention.

    Keys are repeated for grouped heads before: it shards one number of heads.
    """
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(method)
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION] if kind == "cuda" else [SDPBackend.MATH]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    with (
        sdpa_kernel(backends, set_priority=True),
        context_parallel(mesh, buffers=tensors, buffer_seq_dims=[2] * len(tensors)),
    ):
        yield call
