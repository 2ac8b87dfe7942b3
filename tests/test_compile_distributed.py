"""Plans inside models that torch's wrappers shard and replicate: two processes of gloo."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        spec = AttentionSpec(
            seq_len=32, heads=2, head_dim=8, causal=True, dtype="float32", pattern=P.longnet([8, 16], [1, 2]),
            layout="bshd",
        )  # fmt: skip
        self.plan = attnplan.compile(spec)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return self.out(self.plan(q, k, v).flatten(2))


def made():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def work(rank, file, wrapper, compiled):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    given = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(1))
    alone = made()
    alone(given).square().mean().backward()
    model = made()
    if compiled:
        for block in model:
            block.compile(backend="aot_eager", fullgraph=True)
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model(given[2 * rank : 2 * rank + 2]).square().mean().backward()
    for (name, a), b in zip(alone.named_parameters(), model.parameters(), strict=True):
        got = b.grad.full_tensor() if hasattr(b.grad, "full_tensor") else b.grad
        torch.testing.assert_close(got, a.grad, rtol=1e-4, atol=1e-6, msg=name)
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_wrapped_models_train_as_alone(tmp_path, wrapper, compiled):
    torch.multiprocessing.spawn(work, (str(tmp_path / "meeting"), wrapper, compiled), nprocs=2)
