"""Train a small LongNet on the CPU: a byte-level language model on real text, and a copy task.

The text is the standard library's own source; the same model with dense attention is trained on the same bytes. From
the root of the checkout:

    python -m examples.longnet_lm.train                             # both models on text, then the copy task
    python -m examples.longnet_lm.train --task text --attention longnet --minutes 2
    python -m examples.longnet_lm.train --checkpointing --json results.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import attnplan
import attnplan.cost
from attnplan import patterns as P
from examples.longnet_lm.data import (
    COPIED,
    SYMBOLS,
    Batches,
    bigram_entropies,
    copy_batches,
    held_out_windows,
    read_text,
    text_batches,
)
from examples.longnet_lm.model import ByteLM, Settings

# Text: segments of 64 bytes, and of 256 at every second byte (the even ones for one head, the odd ones for the next):
# half as many pairs as dense causal attention.
TEXT_PATTERN = P.longnet([64, 256], [1, 2])
# Copy: a symbol and its copy are COPIED + 1 apart, so the query that predicts the copy is COPIED after the symbol. That
# is beyond the smallest segment, so only the second branch can carry it; the branch lets positions meet that are
# congruent modulo its rate, so COPIED is a multiple of it; and segment 128 = 2 * COPIED holds the whole sequence.
COPY_PATTERN = P.longnet([32, 128], [1, 2])
COPY_TESTS = 128

TEXT = Settings(length=256, batch=4, steps=1600, layers=4, learning_rate=5e-3)
COPY = Settings(length=2 * COPIED, batch=16, steps=400, layers=2)


def next_loss(model: ByteLM, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def train_model(model: ByteLM, batches: Batches, settings: Settings, tick: Callable[[float], None]) -> list[float]:
    """Train with AdamW, a warm-up and a cosine; return the losses in bits."""
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, settings.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * i / settings.steps))
    )
    losses = []
    for _ in range(settings.steps):
        loss = next_loss(model, *next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item() / math.log(2))
        tick(losses[-1])
    return losses


@torch.inference_mode()
def bits_per_byte(model: ByteLM, windows: Tensor) -> float:
    losses = [next_loss(model, w[:, :-1], w[:, 1:]).item() * len(w) for w in windows.split(16)]
    return sum(losses) / len(windows) / math.log(2)


@torch.inference_mode()
def copy_accuracy(model: ByteLM, seed: int) -> float:
    """Return the share of symbols that are copied right, on new sequences."""
    tokens, targets = next(copy_batches(COPY_TESTS, seed + 1_000_000))
    return float((model(tokens).argmax(2) == targets)[:, COPIED:].float().mean())


def fitted_steps(settings: Settings, pattern: P.Pattern | P.Mixture, batches: Batches, args: Any) -> int:
    """Return the number of steps that fit into ``args.minutes``, judged by a few."""
    model, few = ByteLM(settings, pattern, args.checkpointing), attrs.evolve(settings, steps=3)
    train_model(model, batches, few, lambda _: None)  # the first calls plan
    start = time.perf_counter()
    train_model(model, batches, few, lambda _: None)
    return max(10, int(args.minutes * 60 * few.steps / (time.perf_counter() - start)))


def run_training(
    name: str, settings: Settings, pattern: P.Pattern | P.Mixture, batches: Batches, args: Any, console: Console
) -> tuple[ByteLM, dict[str, Any]]:
    """Train one model from the seed under a progress bar; return it and what it took."""
    torch.manual_seed(args.seed)
    model = ByteLM(settings, pattern, args.checkpointing)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    wall, cpu = time.perf_counter(), time.process_time()
    with Progress(*columns, TextColumn("{task.fields[bits]:.2f} bits"), console=console) as progress:
        task = progress.add_task(name, total=settings.steps, bits=math.nan)
        losses = train_model(model, batches, settings, lambda bits: progress.update(task, advance=1, bits=bits))
    return model, {
        "pattern": repr(pattern),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": settings.steps * settings.batch * settings.length,
        "last_train_bits": sum(losses[-20:]) / len(losses[-20:]),
        "train_wall_s": time.perf_counter() - wall,
        "train_cpu_s": time.process_time() - cpu,
    }


def text_task(args: Any, console: Console) -> dict[str, Any]:
    """Train on text; compare with bigrams and, if both are wanted, dense attention."""
    patterns = {"longnet": TEXT_PATTERN, "dense": P.full()}
    wanted = {name: patterns[name] for name in patterns if args.attention in (name, "both")}
    train, held = read_text()
    settings, windows = TEXT, held_out_windows(held, TEXT.length)
    if args.minutes:
        first = next(iter(wanted.values()))
        batches = text_batches(train, settings.batch, settings.length, args.seed)
        settings = attrs.evolve(settings, steps=fitted_steps(settings, first, batches, args))
    fitted, own = bigram_entropies(train, windows)
    result: dict[str, Any] = {
        "settings": attrs.asdict(settings),
        "text": {
            "source": "standard library, [a-z]*.py, every tenth file held out",
            "train_bytes": len(train),
            "held_out_bytes": len(held),
            "predicted_bytes": windows[:, 1:].numel(),
            "sha256": hashlib.sha256(bytes(train.numpy()) + bytes(held.numpy())).hexdigest(),
        },
        "bigram_model_bits": fitted,
        "bigram_entropy_bits": own,
    }
    for name, pattern in wanted.items():
        batches = text_batches(train, settings.batch, settings.length, args.seed)  # the same bytes, in the same order
        model, result[name] = run_training(f"text, {name}", settings, pattern, batches, args, console)
        result[name]["bits_per_byte"] = bits_per_byte(model, windows)
    if len(wanted) == 2:
        result["longnet_over_dense"] = result["longnet"]["bits_per_byte"] / result["dense"]["bits_per_byte"]
    return result


def copy_task(args: Any, console: Console) -> dict[str, Any]:
    """Train the copy task on LongNet."""
    batches = copy_batches(COPY.batch, args.seed)
    model, result = run_training("copy, longnet", COPY, COPY_PATTERN, batches, args, console)
    accuracy = copy_accuracy(model, args.seed)
    return {"settings": attrs.asdict(COPY), "distance": COPIED + 1, "symbols": SYMBOLS, **result, "accuracy": accuracy}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small LongNet on the CPU.")
    parser.add_argument("--task", choices=("text", "copy", "both"), default="both")
    parser.add_argument("--attention", choices=("longnet", "dense", "both"), default="both", help="of the text task")
    parser.add_argument("--minutes", type=float, help=f"for each text model, instead of {TEXT.steps} steps")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward: less memory")
    parser.add_argument("--threads", type=int, default=1, help="these small tensors gain little from more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    return parser.parse_args()


def report(console: Console, results: dict[str, Any]) -> None:
    """Print what was reached."""
    table = Table("", "result", "minutes")
    if "text" in results:
        text = results["text"]
        table.add_row("bigram model, from the training text", f"{text['bigram_model_bits']:.3f} bits per byte", "")
        table.add_row("bigram entropy of the held-out text", f"{text['bigram_entropy_bits']:.3f} bits per byte", "")
        for name in ("longnet", "dense"):
            if name in text:
                bits, seconds = text[name]["bits_per_byte"], text[name]["train_wall_s"]
                table.add_row(f"{name}, held-out text", f"{bits:.3f} bits per byte", f"{seconds / 60:.1f}")
        if "longnet_over_dense" in text:
            table.add_row("longnet / dense", f"{text['longnet_over_dense']:.4f}", "")
    if "copy" in results:
        copy = results["copy"]
        title = f"longnet, copy at a distance of {copy['distance']}"
        table.add_row(title, f"{copy['accuracy']:.2%} right", f"{copy['train_wall_s'] / 60:.1f}")
    console.print(table)


def main() -> None:
    """Run what was asked for."""
    args = parsed()
    torch.set_num_threads(args.threads)
    console = Console()
    results: dict[str, Any] = {
        "device": attnplan.cost.resolve("cpu").device.title,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "attnplan": attnplan.__version__},
        "arguments": vars(args) | {"json": None},
    }
    for name, run in (("text", text_task), ("copy", copy_task)):
        if args.task in (name, "both"):
            results[name] = run(args, console)
    report(console, results)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
