"""Measures every GPU backend that is installed against its own kernel called by hand, and writes the rows as JSON.

    python -m bench.gpu_backends --json bench/results/gpu-backends.json
    python -m bench.gpu_backends --dry-run                  tiny, on the CPU: tries the script, measures nothing

Each contest is one process and one round-robin, medians are compared. ``seconds`` is device time between two events;
``host`` is what a call keeps the host busy. xformers and flash-attn 4 exclude each other: run once with each.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost import Target, resolve
from attnplan.packages import PACKAGES, installed
from attnplan.patterns.tiles import block_table
from attnplan.plan import Plan
from attnplan.runtime.kernels_flash import block_tensors
from attnplan.runtime.tables import block_lists
from attnplan.search import Found, _options
from attnplan.units import format_seconds

KEEPS = (0.5, 0.2, 0.1, 0.05, 0.02)
WARM_UPS = 5
HOPELESS = 6
"""Plans that are predicted to take this many times as long as the fastest are not run."""
Call = Callable[[], Any]


@attrs.frozen
class Setting:
    """Sizes of a run."""

    target: Target
    dtype: str
    rounds: int
    plain: int
    """Tokens of plain causal attention."""
    long: int
    """Tokens of the sparse patterns."""
    heads: int
    head_dim: int
    unit: int
    """Tokens in the place of 128: tiles, global tokens."""

    def spec(self, tokens: int, pattern: Any, causal: bool) -> AttentionSpec:
        return AttentionSpec(
            seq_len=tokens, heads=self.heads, head_dim=self.head_dim, pattern=pattern, causal=causal, dtype=self.dtype
        )

    def tensors(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v ``[1, H, S, D]`` that are views of ``[1, S, H, D]``, as models make them."""
        sizes = (1, tokens, self.heads, self.head_dim)
        made = (torch.randn(sizes, device=self.target.torch_device, dtype=getattr(torch, self.dtype)) for _ in "qkv")
        q, k, v = (x.transpose(1, 2) for x in made)
        return q, k, v


def plans(spec: AttentionSpec, target: Target) -> Iterator[Plan]:
    """Iterate over a plan for each strategy and schedule that runs a spec by a fused kernel, the hopeless left out."""
    found = [o for o in _options(spec, target, "auto", "auto") if not o[3].reasons and o[2].runs]
    best = min((o[3].prediction.seconds for o in found if o[3].prediction), default=0.0)
    for lowered, backend, schedule, candidate in found:
        if candidate.prediction is not None and candidate.prediction.seconds <= HOPELESS * best:
            yield Plan(
                spec, target, Found(lowered, candidate, backend, schedule, (candidate,)), {"backend": backend.name}
            )


def name_of(plan: Plan) -> str:
    return f"{plan.strategy} > {plan.backend} ({plan.schedule})"


# ------------------------------------------------------------------------------------------------------------- clocks


def race(contestants: dict[str, Call], rounds: int, on_gpu: bool) -> dict[str, dict[str, float]]:
    """Return medians of device time and of host time, the contestants taking turns."""
    for _ in range(WARM_UPS):
        for run in contestants.values():
            run()
    device: dict[str, list[float]] = {name: [] for name in contestants}
    host: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            one = _on_gpu(run) if on_gpu else _on_cpu(run)
            device[name].append(one[0])
            host[name].append(one[1])
    return {
        name: {
            "seconds": statistics.median(device[name]),
            "fastest": min(device[name]),
            "slowest": max(device[name]),
            "host": statistics.median(host[name]),
        }
        for name in contestants
    }


def _on_gpu(run: Call) -> tuple[float, float]:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, host


def _on_cpu(run: Call) -> tuple[float, float]:
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return seconds, seconds


# ------------------------------------------------------------------------------------------------------- raw kernels


def raw(plan: Plan, q: Tensor, k: Tensor, v: Tensor, window: tuple[int | None, int | None] = (None, 0)) -> Call:
    """Return the call of the kernel of a plan's schedule by hand, causal."""
    aten, scale = torch.ops.aten, plan.spec.softmax_scale
    key = plan._schedule.runs
    if key == "flash-cpu":
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if key == "flash-cuda":
        return lambda: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)[0]
    if key == "cudnn":
        return lambda: aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True, False, scale=scale)[0]
    if key == "efficient":
        return lambda: aten._scaled_dot_product_efficient_attention(q, k, v, None, False, 0.0, True, scale=scale)[0]
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    if key.startswith("xformers"):
        from attnplan.runtime.kernels_xformers import fmha

        operator = {"xformers-flash": fmha().flash, "xformers-cutlass": fmha().cutlass}[key].FwOp
        bias = fmha().attn_bias.LowerTriangularMask()
        return lambda: fmha().memory_efficient_attention_forward(*rows, bias, scale=scale, op=operator).transpose(1, 2)
    function = import_module(f"{_interface(key)}").flash_attn_func
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    if window != (None, 0):
        options = {"softmax_scale": scale, "causal": False, "window_size": window}

    def by_hand() -> Tensor:
        found = function(*rows, **options)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return by_hand


def _interface(key: str) -> str:
    from attnplan.runtime.kernels_all import KERNELS

    return str(getattr(KERNELS[key], "interface"))  # noqa: B009  # not every kernel has one


# ------------------------------------------------------------------------------------------------------------ contests


def plain(setting: Setting) -> Iterator[dict[str, Any]]:
    """Plain causal attention: every schedule beside its kernel called by hand."""
    spec = setting.spec(setting.plain, P.full(), causal=True)
    q, k, v = setting.tensors(setting.plain)
    for plan in plans(spec, setting.target):
        if plan.strategy != "dense":
            continue
        times = race({"plan": partial(plan, q, k, v), "raw": raw(plan, q, k, v)}, setting.rounds, _gpu(setting))
        ratio = times["plan"]["seconds"] / times["raw"]["seconds"]
        extra = times["plan"]["host"] - times["raw"]["host"]
        same = (plan(q, k, v) - raw(plan, q, k, v)()).abs().max().item()
        yield {"what": "plain causal", "plan": name_of(plan), **_flat(times), "ratio": ratio, "host over raw": extra,
               "largest difference": same}  # fmt: skip


def window(setting: Setting) -> Iterator[dict[str, Any]]:
    """A causal window: every plan, and flash-attn by hand."""
    wide = 32 * setting.unit
    spec = setting.spec(setting.long, P.window(wide - 1), causal=True)
    q, k, v = setting.tensors(setting.long)
    found = [p for p in plans(spec, setting.target) if p.predicted.peak_bytes < setting.target.device.memory / 4]
    for plan in found:
        contestants: dict[str, Call] = {"plan": partial(plan, q, k, v)}
        if plan.backend == "flash":
            contestants["raw"] = raw(plan, q, k, v, (wide - 1, 0))
        times = race(contestants, setting.rounds, _gpu(setting))
        ratio = times["plan"]["seconds"] / times["raw"]["seconds"] if "raw" in times else None
        yield {"what": f"causal window {wide}", "plan": name_of(plan), **_flat(times), "ratio": ratio}


def blocks(setting: Setting) -> Iterator[dict[str, Any]]:
    """Random whole blocks: flash-attn 4 over tables, by hand, and dense."""
    q, k, v = setting.tensors(setting.long)
    dense = next(iter(plans(setting.spec(setting.long, P.full(), causal=False), setting.target)))
    best = [p for p in plans(setting.spec(setting.long, P.full(), causal=False), setting.target) if p.schedule == "fa4"]
    dense = best[0] if best else dense
    for keep in KEEPS:
        spec = setting.spec(setting.long, P.random_blocks(keep, setting.unit, 0), causal=False)
        for plan in plans(spec, setting.target):
            if plan.strategy != "blocks":
                continue
            contestants: dict[str, Call] = {"plan": partial(plan, q, k, v), "dense": partial(dense, q, k, v)}
            if plan.schedule == "fa4":
                contestants["raw"] = _blocks_by_hand(plan, q, k, v)
            times = race(contestants, setting.rounds, _gpu(setting))
            faster = times["dense"]["seconds"] / times["plan"]["seconds"]
            row = {
                "what": "random blocks",
                "keep": keep,
                "plan": name_of(plan),
                "dense": name_of(dense),
                **_flat(times),
            }
            row |= {"faster than dense": faster, "of the ideal": faster * keep}
            if "raw" in times:
                row["ratio"] = times["plan"]["seconds"] / times["raw"]["seconds"]
            yield row


def _blocks_by_hand(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Call:
    made = block_lists(block_table(plan.spec.branches[0], plan.spec.shape, plan._schedule.tile or (128, 128)), q.device)
    tensors = block_tensors(made, made.rows)
    function = import_module("flash_attn.cute.interface").flash_attn_func
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: function(*rows, softmax_scale=plan.spec.softmax_scale, block_sparse_tensors=tensors)[0]


def longformer(setting: Setting) -> Iterator[dict[str, Any]]:
    """A window of 2,048 keys in all, and 128 global tokens: every strategy side by side."""
    pattern = P.window(8 * setting.unit) | P.global_tokens(setting.unit)
    spec = setting.spec(setting.long, pattern, causal=False)
    q, k, v = setting.tensors(setting.long)
    for plan in plans(spec, setting.target):
        if plan.predicted.peak_bytes > setting.target.device.memory / 4:
            continue
        times = race({"plan": partial(plan, q, k, v)}, setting.rounds, _gpu(setting))
        predicted = plan.predicted.seconds
        yield {"what": "longformer", "plan": name_of(plan), **_flat(times), "predicted": predicted}


def repeats(setting: Setting) -> Iterator[dict[str, Any]]:
    """Which schedules repeat forward and backward bit for bit, thirty times: what ``deterministic=True`` may choose."""
    tokens = min(setting.plain, 2048)
    for causal, pattern in (
        (True, P.full()),
        (True, P.window(8 * setting.unit)),
        (False, P.longnet([tokens // 4], [2])),
    ):
        spec = setting.spec(tokens, pattern, causal=causal)
        leaves = [x.detach().requires_grad_() for x in setting.tensors(tokens)]
        grad = torch.randn_like(leaves[0])
        for plan in plans(spec, setting.target):
            runs = []
            for _ in range(30 if _gpu(setting) else 2):
                out = plan(*leaves)
                runs.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
            forward = all(torch.equal(r[0], runs[0][0]) for r in runs)
            backward = all(torch.equal(a, b) for r in runs for a, b in zip(r[1:], runs[0][1:], strict=True))
            yield {"what": "repeats", "pattern": repr(pattern), "plan": name_of(plan), "forward": forward,
                   "backward": backward}  # fmt: skip


CONTESTS = {"plain": plain, "window": window, "blocks": blocks, "longformer": longformer, "repeats": repeats}


def _gpu(setting: Setting) -> bool:
    return setting.target.device.kind == "cuda"


def _flat(times: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{name} {what}": value for name, found in times.items() for what, value in found.items()}


def environment(setting: Setting) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if _gpu(setting) else platform.processor() or "cpu"
    return {
        "device": device,
        "versions": installed(PACKAGES),
        "python": platform.python_version(),
        "rounds": setting.rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--only", default=",".join(CONTESTS), help="contests, separated by commas")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    given = parser.parse_args()
    if given.dry_run:
        setting = Setting(resolve("cpu"), "float32", 2, plain=256, long=512, heads=2, head_dim=16, unit=16)
    else:
        setting = Setting(resolve("cuda"), "bfloat16", given.rounds, 16_384, 65_536, heads=16, head_dim=128, unit=128)
    torch.manual_seed(0)
    found: dict[str, Any] = {"environment": environment(setting), "rows": []}
    for name in given.only.split(","):
        try:
            for row in CONTESTS[name](setting):
                found["rows"].append(row)
                brief = (f"{k} {format_seconds(v) if 'seconds' in k else v}" for k, v in row.items() if k != "what")
                print(f"{row['what']:<20} {', '.join(brief)}", flush=True)
        except Exception as error:  # one contest that fails must not cost the others
            found["rows"].append({"what": name, "failed": f"{type(error).__name__}: {error}"})
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
