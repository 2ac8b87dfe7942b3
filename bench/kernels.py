"""Measures every GPU backend that is installed beside its own kernel called by hand; run once with each package.

    python -m bench.kernels --gpu --budget 240 --json bench/results/kernels-fa4-h100.json
    python -m bench.kernels --json /tmp/tiny.json       tiny, on the CPU: tries the script, measures nothing

Contests, each a few rows: ``plain`` causal attention (at most 1 % and 15 microseconds of host time over the kernel),
``window`` and ``blocks`` (at most 2 % over flash-attn 4 by hand; speed against what is kept), ``longformer`` (every
strategy, with its kernels), ``check`` (what has never been run on a GPU against what has). ``--plot FILE.svg`` draws
the rows of ``--json``, and measures nothing. Device times are those between two events on a device that was busy
before, so that no kernel waits for its host; contestants take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost import Target, resolve
from attnplan.plan import Plan
from attnplan.search import every_way
from bench.kernels_by_hand import blocks_by_hand, flex_by_hand, raw
from bench.kernels_clock import Ledger, Row, host, parts, race

KEEPS = (0.5, 0.2, 0.1, 0.05, 0.02)
HOST_ROUNDS, HOST_CALLS = 25, 12
HOPELESS = 6
"""Plans that are predicted to take this many times as long as the fastest are not run."""


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

    @property
    def on_gpu(self) -> bool:
        return self.target.device.kind == "cuda"

    def spec(self, tokens: int, pattern: Any, *, causal: bool) -> AttentionSpec:
        return AttentionSpec(
            seq_len=tokens, heads=self.heads, head_dim=self.head_dim, pattern=pattern, causal=causal, dtype=self.dtype
        )

    def tensors(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v ``[1, H, S, D]`` that are views of ``[1, S, H, D]``, as models make them."""
        sizes = (1, tokens, self.heads, self.head_dim)
        made = (torch.randn(sizes, device=self.target.torch_device, dtype=getattr(torch, self.dtype)) for _ in "qkv")
        q, k, v = (x.transpose(1, 2) for x in made)
        return q, k, v


def plans(spec: AttentionSpec, target: Target) -> list[Plan]:
    """Return a plan for each strategy and schedule that runs a spec by a fused kernel, the hopeless left out."""
    found = [(c, f) for c, f in every_way(spec, target) if f is not None and f.schedule.runs]
    found.sort(key=lambda pair: pair[0].prediction.seconds)
    best = found[0][0].prediction.seconds if found else 0.0
    fits = target.device.memory / 3
    return [
        Plan(spec, target, way, {"backend": c.backend})
        for c, way in found
        if c.prediction.seconds <= HOPELESS * best and c.prediction.peak_bytes <= fits
    ]


def name_of(plan: Plan) -> str:
    return f"{plan.strategy} > {plan.backend} ({plan.schedule})"


def flat(times: dict[str, dict[str, float]]) -> Row:
    return {f"{name} {what}": value for name, found in times.items() for what, value in found.items()}


def apart(a: Tensor, b: Tensor) -> float:
    """Return the relative L2 distance of two outputs."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def plain(setting: Setting, ledger: Ledger) -> None:
    """Plain causal attention: every schedule beside its kernel called by hand."""
    q, k, v = setting.tensors(setting.plain)
    for plan in plans(setting.spec(setting.plain, P.full(), causal=True), setting.target):
        if plan.strategy != "dense":
            continue

        def one(plan: Plan = plan) -> Row:
            by_hand = raw(plan, q, k, v)
            both = {"plan": partial(plan, q, k, v), "raw": by_hand}
            times = race(both, setting.rounds, on_gpu=setting.on_gpu)
            waits = host(both, HOST_ROUNDS, HOST_CALLS, on_gpu=setting.on_gpu)
            over = [a - b for a, b in zip(waits["plan"], waits["raw"], strict=True)]
            return {
                **flat(times),
                "ratio": times["plan"]["seconds"] / times["raw"]["seconds"],
                "microseconds over raw": 1e6 * statistics.median(over),
                "plan microseconds": 1e6 * statistics.median(waits["plan"]),
                "difference": apart(plan(q, k, v), by_hand()),
            }

        ledger.measure("plain causal", name_of(plan), one)


def window(setting: Setting, ledger: Ledger) -> None:
    """A causal window by each kernel that knows windows, and flash-attn by hand."""
    wide = 32 * setting.unit
    q, k, v = setting.tensors(setting.long)
    for plan in plans(setting.spec(setting.long, P.window(wide - 1), causal=True), setting.target):
        if plan.strategy != "dense" or "window" not in plan._schedule.native:
            continue

        def one(plan: Plan = plan) -> Row:
            both: dict[str, Callable[[], Any]] = {"plan": partial(plan, q, k, v)}
            if plan.backend == "flash":
                both["raw"] = raw(plan, q, k, v, (wide - 1, 0))
            times = race(both, setting.rounds, on_gpu=setting.on_gpu)
            more = {"ratio": times["plan"]["seconds"] / times["raw"]["seconds"]} if "raw" in times else {}
            return {**flat(times), **more}

        ledger.measure(f"causal window {wide}", name_of(plan), one)


def blocks(setting: Setting, ledger: Ledger) -> None:
    """Random whole blocks: flash-attn 4 over tables by a plan and by hand, and dense."""
    q, k, v = setting.tensors(setting.long)
    every = plans(setting.spec(setting.long, P.full(), causal=False), setting.target)
    dense = next((p for p in every if p.schedule == "fa4"), every[0])
    for keep in KEEPS:
        for plan in plans(
            setting.spec(setting.long, P.random_blocks(keep, setting.unit, 0), causal=False), setting.target
        ):
            if plan.strategy != "blocks" or (setting.on_gpu and plan.schedule != "fa4"):
                continue

            def one(plan: Plan = plan, keep: float = keep) -> Row:
                three: dict[str, Callable[[], Any]] = {"plan": partial(plan, q, k, v), "dense": partial(dense, q, k, v)}
                if plan.schedule == "fa4":
                    three["raw"] = blocks_by_hand(plan, q, k, v)
                times = race(three, setting.rounds, on_gpu=setting.on_gpu)
                faster = times["dense"]["seconds"] / times["plan"]["seconds"]
                more = {"ratio": times["plan"]["seconds"] / times["raw"]["seconds"]} if "raw" in times else {}
                return {"keep": keep, **flat(times), "faster than dense": faster, "of the ideal": faster * keep, **more}

            ledger.measure("random blocks", name_of(plan), one)


WITHOUT = "without its global rows"


def longformer(setting: Setting, ledger: Ledger) -> None:
    """A window of 2,048 keys in all, and 128 global tokens: every strategy side by side, and FlexAttention by hand."""
    spec = setting.spec(setting.long, P.window(8 * setting.unit) | P.global_tokens(setting.unit), causal=False)
    q, k, v = setting.tensors(setting.long)
    want: list[Tensor] = []
    contestants: dict[str, Callable[[], Any]] = {name_of(p): partial(p, q, k, v) for p in plans(spec, setting.target)}
    if setting.on_gpu:
        contestants["FlexAttention by hand"] = flex_by_hand(spec, q, k, v)
    rest = attrs.evolve(spec, pattern=P.window(8 * setting.unit) | P.sinks(setting.unit))
    for plan in plans(rest, setting.target):
        if plan.strategy == "blocks":  # how long rows that see every key hold up one call for all
            contestants[f"{WITHOUT}, {name_of(plan)}"] = partial(plan, q, k, v)
    for name, run in contestants.items():

        def one(name: str = name, run: Callable[[], Any] = run) -> Row:
            out = run()
            if not want:
                want.append(out)
            times = race({"plan": run}, setting.rounds, on_gpu=setting.on_gpu)
            row: Row = flat(times) if name.startswith(WITHOUT) else {**flat(times), "difference": apart(out, want[0])}
            if setting.on_gpu:
                try:
                    row["kernels"] = parts(run)
                except Exception as error:  # a profiler that does not work must not cost the times
                    row["not profiled"] = f"{type(error).__name__}: {error}"[:200]
            return row

        row = ledger.measure("longformer", name, one)
        for kernel, microseconds in (row or {}).get("kernels", {}).items():
            print(f"    {microseconds:9.1f} us  {kernel}")


def check(setting: Setting, ledger: Ledger) -> None:
    """What flash-attn does that was never run on a GPU: its output and gradients beside those of torch's kernels."""
    tokens, wide = 16 * setting.unit - 3, setting.unit + 3
    for what, options in {
        "window and globals": {"pattern": P.window(wide) | P.global_tokens(5)},
        "streaming": {"pattern": (P.window(wide) | P.sinks(5)) & P.causal()},
        "heads differ": {"pattern": (P.heads(0, 1) & P.window(9)) | (P.heads(1, setting.heads) & P.causal())},
        "few queries": {"seq_len": 5, "kv_len": 64 * setting.unit - 3},
        "sinks": {"sink_logits": True, "causal": True},
    }.items():
        spec = attrs.evolve(setting.spec(tokens, P.full(), causal=False), **options)
        every = plans(spec, setting.target)
        known = next((p for p in every if p.backend == "eager"), every[0])
        leaves = [
            setting.tensors(n)[0].detach().requires_grad_() for n in (spec.shape.seq_len, *[spec.shape.kv_len] * 2)
        ]
        grad = torch.randn_like(leaves[0])
        given = {"sink_logits": torch.linspace(-2, 2, setting.heads).to(grad)} if spec.sink_logits else {}

        def numbers(
            plan: Plan, leaves: list[Tensor] = leaves, grad: Tensor = grad, given: dict[str, Tensor] = given
        ) -> list[Tensor]:
            out = plan(*leaves, **given)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

        for plan in (p for p in every if p.backend == "flash"):

            def one(plan: Plan = plan, known: Plan = known, numbers: Callable[..., list[Tensor]] = numbers) -> Row:
                pairs = zip(("out", "dq", "dk", "dv"), numbers(plan), numbers(known), strict=True)
                return {"beside": name_of(known)} | {n: apart(a, b) for n, a, b in pairs}

            ledger.measure(f"check: {what}", name_of(plan), one)


CONTESTS: dict[str, Callable[[Setting, Ledger], None]] = {
    "longformer": longformer, "blocks": blocks, "plain": plain, "window": window, "check": check,
}  # fmt: skip


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the figures that a target is about, one line for each row."""
    for row in rows:
        if "plan seconds" not in row:
            errors = ", ".join(f"{n} {row[n]:.1e}" for n in ("out", "dq", "dk", "dv") if n in row)
            yield f"{row['what']:<28} {row['plan']:<34} {row.get('failed', row.get('skipped', errors))[:90]}"
            continue
        figures = [f"{1e3 * row['plan seconds']:8.3f} ms"]
        figures += [f"x {row['ratio']:.4f} of the kernel"] if "ratio" in row else []
        figures += [f"{row['microseconds over raw']:+.1f} us"] if "microseconds over raw" in row else []
        figures += [f"keep {row['keep']}: {row['of the ideal']:.3f} of the ideal"] if "keep" in row else []
        yield f"{row['what']:<28} {row['plan']:<34} {'  '.join(figures)}"


def plot(rows: list[Row], path: Path) -> None:
    """Draw the speed of block-sparse attention over dense against what is kept."""
    from matplotlib.figure import Figure

    found = sorted((r["keep"], r["faster than dense"]) for r in rows if "faster than dense" in r)
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.loglog([k for k, _ in found], [1 / k for k, _ in found], "--", color="grey", label="1 / keep")
    axes.loglog([k for k, _ in found], [f for _, f in found], "o-", label="flash-attn 4, whole blocks of 128")
    axes.set(xlabel="share of the blocks that is kept", ylabel="times as fast as dense")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="full sizes, on the GPU")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--only", default=",".join(CONTESTS), help="contests, separated by commas")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which no row is begun")
    parser.add_argument("--each", type=float, default=60.0, help="seconds that one row may take")
    parser.add_argument("--plot", type=Path, help="draw the rows of --json, and measure nothing")
    given = parser.parse_args()
    if given.plot is not None:
        plot(json.loads(given.json.read_text(encoding="utf-8"))["rows"], given.plot)
        return
    if given.gpu:
        setting = Setting(resolve("cuda"), "bfloat16", given.rounds, 16_384, 65_536, heads=16, head_dim=128, unit=128)
    else:
        setting = Setting(resolve("cpu"), "float32", 2, plain=256, long=512, heads=2, head_dim=16, unit=16)
    torch.manual_seed(0)
    ledger = Ledger(given.json, given.budget, given.each, on_gpu=given.gpu)
    for name in given.only.split(","):
        try:
            CONTESTS[name](setting, ledger)
        except Exception as error:  # planning failed: the other contests go on
            ledger.add({"what": name, "plan": "", "failed": f"{type(error).__name__}: {error}"[:400]})
        if given.gpu:
            torch.cuda.empty_cache()
    print("\n".join(table(ledger.found["rows"])))


if __name__ == "__main__":
    main()
