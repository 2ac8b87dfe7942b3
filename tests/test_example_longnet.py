"""The LongNet example: what makes it a fair comparison, and (slow) that it reaches its targets."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import attrs
import pytest
import torch
from rich.console import Console

from attnplan import patterns as P
from examples.longnet_lm.data import (
    COPIED,
    bigram_entropies,
    copy_batches,
    held_out_windows,
    read_text,
    text_batches,
)
from examples.longnet_lm.model import ByteLM, Settings, rotate
from examples.longnet_lm.train import COPY, COPY_PATTERN, TEXT_PATTERN, next_loss, report, train_model

ROOT = Path(__file__).resolve().parent.parent
SMALL = Settings(length=128, batch=2, steps=8, layers=2, dim=32)


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads wait for each other longer than these sizes take, wherever the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_model(pattern: P.Pattern | P.Mixture = TEXT_PATTERN, checkpointing: bool = False) -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(SMALL, pattern, checkpointing)


@pytest.mark.parametrize("pattern", [P.full(), TEXT_PATTERN, COPY_PATTERN], ids=["dense", "text", "copy"])
def test_a_byte_never_changes_earlier_logits(pattern):
    model = small_model(pattern)
    tokens = torch.randint(256, (1, SMALL.length))
    with torch.inference_mode():
        before = model(tokens)
        for j in (0, 1, 31, 32, 63, 64, 65, 126, 127):
            changed = tokens.clone()
            changed[0, j] = (changed[0, j] + 1) % 256
            after = model(changed)
            assert torch.equal(after[:, :j], before[:, :j])
            assert not torch.equal(after[:, j], before[:, j])


def test_the_copy_needs_the_dilated_branch():
    tokens, _ = next(copy_batches(1, 0))
    for pattern, reaches in ((COPY_PATTERN, True), (P.longnet([32], [1]), False)):
        model = small_model(pattern)
        embedded = model.embed(tokens).detach().requires_grad_()
        model.embed.forward = lambda _, embedded=embedded: embedded
        for i in (COPIED, COPIED + 33, 2 * COPIED - 1):  # rows that predict the copy of the symbol at i - COPIED
            (gradient,) = torch.autograd.grad(model(tokens)[0, i].square().sum(), embedded)
            assert bool(gradient[0, i - COPIED].any()) == reaches


def test_dense_is_dense():
    model, tokens = small_model(P.full()), torch.randint(256, (2, 50))
    with torch.inference_mode():
        planned = model(tokens)
        for block in model.blocks:
            block.attention.attend.forward = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
            ).transpose(1, 2)
        torch.testing.assert_close(planned, model(tokens))


def test_rotary_positions_are_relative():
    model = small_model(P.full())
    q, k = torch.randn(2, 1, SMALL.length, 4, 8)
    one = rotate(q[:, :1].expand_as(q), model.turns)
    other = rotate(k[:, :1].expand_as(k), model.turns)
    scores = torch.einsum("bihd,bjhd->hij", one, other)
    torch.testing.assert_close(scores[:, 5:, 5:], scores[:, :-5, :-5], atol=1e-4, rtol=1e-4)


def test_checkpointing_gives_the_same_gradients():
    tokens, targets = next(text_batches(read_text()[0], SMALL.batch, SMALL.length, 0))
    gradients = []
    for checkpointing in (False, True):
        model = small_model(checkpointing=checkpointing)
        next_loss(model, tokens, targets).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_loss_falls():
    batches = text_batches(read_text()[0], SMALL.batch, SMALL.length, 0)
    ticks: list[float] = []
    losses = train_model(small_model(), batches, attrs.evolve(SMALL, steps=25), ticks.append)
    assert losses == ticks
    assert losses[0] == pytest.approx(8, abs=0.2)
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5


def test_text_is_deterministic_and_held_out():
    (train, held), (again, _) = read_text(), read_text()
    assert torch.equal(train, again)
    assert len(train) > 2_000_000 < 10 * len(held)
    windows = held_out_windows(held, SMALL.length)
    assert 256 <= len(windows) <= 512
    assert bytes(windows[7, :65].to(torch.uint8).numpy()) in bytes(held.numpy())
    first, same, other = (list(islice(text_batches(train, 2, 16, seed), 3)) for seed in (0, 0, 1))
    for (x, y), (x2, y2), (x3, _) in zip(first, same, other, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert not torch.equal(x, x3)


def test_copy_sequences():
    tokens, targets = next(copy_batches(3, 0))
    assert tokens.shape == targets.shape == (3, COPY.length)
    assert (targets[:, :COPIED] == -100).all()
    assert torch.equal(targets[:, COPIED:], tokens[:, :COPIED])
    assert torch.equal(targets[:, COPIED:-1], tokens[:, COPIED + 1 :])


def test_bigram_entropies_by_hand():
    text = torch.tensor([0, 1, 0, 1, 0, 2], dtype=torch.uint8)
    # after 0: 1, 1, 2; after 1: 0, 0. With one added: 3/259, 2/259 and 3/258.
    fitted, own = bigram_entropies(text, text[None].long())
    p = torch.tensor([3 / 259, 3 / 259, 2 / 259, 3 / 258, 3 / 258], dtype=torch.float64)
    assert fitted == pytest.approx(-p.log2().mean().item())
    q = torch.tensor([2 / 3, 2 / 3, 1 / 3, 1, 1], dtype=torch.float64)
    assert own == pytest.approx(-q.log2().mean().item())


def test_the_report_prints_what_there_is():
    console = Console(record=True, quiet=True)
    report(console, {"copy": {"distance": 65, "accuracy": 0.995, "train_wall_s": 60.0}})
    report(console, {"text": {"bigram_model_bits": 3.5, "bigram_entropy_bits": 3.3}})


@pytest.mark.slow
def test_the_example_reaches_its_targets(tmp_path):
    file = tmp_path / "results.json"
    subprocess.run([sys.executable, "-m", "examples.longnet_lm.train", "--json", str(file)], cwd=ROOT, check=True)
    results = json.loads(file.read_text())
    text, copy = results["text"], results["copy"]
    assert text["longnet"]["bits_per_byte"] < min(text["bigram_entropy_bits"], text["bigram_model_bits"])
    assert text["longnet_over_dense"] <= 1.03
    assert copy["accuracy"] >= 0.95
    assert sum(run["train_cpu_s"] for run in (text["longnet"], text["dense"])) <= 600
    assert copy["train_cpu_s"] <= 300
