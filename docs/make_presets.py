"""Write docs/presets.md: every preset with its paper, its formula, and its mask as attnplan draws it.

Run ``python docs/make_presets.py`` after changing a preset; a test compares the page with what this makes.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import attrs

from attnplan import patterns as P
from attnplan.mask_text import mask_lines
from attnplan.spec import AttentionSpec

PAGE = Path(__file__).resolve().parent / "presets.md"

HEAD = """\
# Presets

Published sparse patterns as one line each. All but `neighborhood`, which is an atom, are combinations of atoms with
`&`, `|` and `~`: `repr` shows which, and they are planned, counted and proved like anything written by hand. The text
of a line, without `P.`, is also what `pattern =` takes in a spec file.

In the formulas i is the position of a query, j that of a key and h a head. A `window` counts keys as `P.window` does,
without the query's own position. Each mask is drawn by `attnplan.mask_text`, one character per pair: queries
downwards, keys to the right. `█` is a pair of every head, a lighter shade one of some heads.

<!-- Written by docs/make_presets.py. -->
"""


@attrs.frozen
class Section:
    """One preset on the page."""

    name: str
    paper: str
    formula: str
    text: str
    codes: tuple[str, ...]
    """What is drawn, one expression each."""
    length: int = 24
    heads: int = 1
    causal: bool = False

    def write(self) -> str:
        """Return the section in Markdown."""
        prose = (f"{self.paper}.", self.formula, self.text)
        lines = [f"## `{self.name}`", *(textwrap.fill(p, 120, break_on_hyphens=False) for p in prose)]
        for code in self.codes:
            lines += self._example(code)
        return "\n\n".join(lines) + "\n"

    def _example(self, code: str) -> list[str]:
        pattern = P.parse(code)
        spec = AttentionSpec(seq_len=self.length, heads=self.heads, head_dim=8, pattern=pattern, causal=self.causal)
        rows = "\n".join(mask_lines(spec, tiles=self.length))  # a tile is one pair, so that nothing is sampled
        causal = ", causal=True" if self.causal else ""
        call = f"```python\nattnplan.attention(q, k, v, pattern=P.{code}{causal})\n```"
        built = [] if repr(pattern) == code else [f"which is `{pattern!r}`:"]
        return [call, *built, f"```text\n{rows}\n```"]


SECTIONS = (
    Section(
        "longformer",
        "Beltagy et al., *Longformer: The Long-Document Transformer*, arXiv 2004.05150",
        "`|i - j| <= w d` and `(i - j) mod d = 0`, or `i in G`, or `j in G`",
        "`window` is w, half of the paper's window size. Bidirectional; `causal=True` makes it autoregressive.",
        ("longformer(window=3, global_tokens=[0, 12])",),
    ),
    Section(
        "bigbird",
        "Zaheer et al., *Big Bird: Transformers for Longer Sequences*, arXiv 2007.14062",
        "`|I - J| <= (w - 1) / 2`, or `i < g b`, or `j < g b`, or `J in R(I)`, with the blocks `I = floor(i / b)` and "
        "`J = floor(j / b)`",
        "R(I) are r blocks that a hash of the seed and I chooses, the same on every machine. Bidirectional.",
        ("bigbird(block_size=3, global_blocks=1, num_random_blocks=1, seed=1)",),
    ),
    Section(
        "streaming",
        "Xiao et al., *Efficient Streaming Language Models with Attention Sinks*, arXiv 2309.17453",
        "`j <= i`, and `j < s` or `i - j <= w`",
        "Causal by itself. The paper's recent cache holds w + 1 keys, the query's own among them.",
        ("streaming(sinks=2, window=5)",),
    ),
    Section(
        "a_shape",
        "Jiang et al., *MInference 1.0*, arXiv 2407.02490, A-shape heads",
        "`j <= i`, and `j < s` or `i - j <= w`",
        "The pairs of `streaming`, under the name that they have in pre-filling. Causal by itself.",
        ("a_shape(sinks=4, window=3)",),
    ),
    Section(
        "vertical_slash",
        "Jiang et al., *MInference 1.0*, arXiv 2407.02490, vertical-slash heads",
        "`j <= i`, and `j in V` or `i - j in S`",
        "The lists are taken as given; MInference estimates them from the last queries of each head. Causal by itself.",
        ("vertical_slash(vertical=[0, 1, 9], slash=[0, 1, 6, 7])",),
    ),
    Section(
        "sparse_transformer",
        "Child et al., *Generating Long Sequences with Sparse Transformers*, arXiv 1904.10509",
        "Strided: `j <= i`, and `i - j <= l` or `(i - j) mod l = 0`. Fixed: `j <= i`, and "
        "`floor(i / l) = floor(j / l)` or `j mod l >= l - c`",
        "The paper's merged heads, causal by themselves. `kind` is `strided` or `fixed`; c is `expressivity`.",
        (
            "sparse_transformer(6)",
            'sparse_transformer(6, kind="fixed", expressivity=2)',
        ),
    ),
    Section(
        "neighborhood",
        "Hassani et al., *Neighborhood Attention Transformer*, arXiv 2204.07143, and *Dilated Neighborhood Attention "
        "Transformer*, arXiv 2209.15001",
        "In every dimension, j is one of the `kernel` cells nearest to i whose distance is a multiple of `dilation`",
        "Cells are numbered row by row. At a border the window moves inwards; along a causal dimension it ends at the "
        "query and is cut instead. One to three dimensions; without `shape` the sequence is the only one.",
        (
            "neighborhood(7)",
            "neighborhood(3, shape=[4, 6])",
        ),
    ),
    Section(
        "chunked",
        "Meta, *The Llama 4 herd*, 2025, local layers",
        "`floor(i / n) = floor(j / n)`",
        "Another name of `segments`. Llama 4 uses it with `causal=True`, as drawn here.",
        ("chunked(7)",),
        causal=True,
    ),
    Section(
        "prefix_lm",
        "Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer*, "
        "arXiv 1910.10683, section 3.2.1",
        "`j <= i` or `j < n`",
        "It contains its own causality: leave `causal=True` out, or the prefix becomes causal too.",
        ("prefix_lm(8)",),
    ),
    Section(
        "longlora",
        "Chen et al., *LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models*, arXiv 2309.12307",
        "`floor(i / G) = floor(j / G)` for `h < H / 2`, and `floor((i + G / 2) / G) = floor((j + G / 2) / G)` for the "
        "others",
        "The published code rolls the sequence, so that its last half group meets its first one; here these are two "
        "groups of half the size, and nothing leaks. Training uses `causal=True`.",
        ("longlora(group=8, heads=2, length=24)",),
        heads=2,
    ),
)


def page() -> str:
    """Return the page."""
    return "\n".join([HEAD, *(section.write() for section in SECTIONS)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
