"""What other code relies on: the parameters, signatures and defaults of each published multihead class."""

from __future__ import annotations

import inspect
import io

import pytest
import torch

from attnplan.nn import (
    BlockSparseRingMultiheadDilatedAttention,
    ImprovedMultiheadDilatedAttention,
    MultiheadDilatedAttention,
)
from tests.test_nn_multihead import E, block_sparse, fork, improved, pypi, torchscale

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


# State dicts as published, key for key and in order (optimizer states go by position), with shapes.
def _linears(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{n}.{p}": s for n in names for p, s in (("weight", (E, E)), ("bias", (E,)))}


def _norms(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{n}.{p}": (E,) for n in names for p in ("weight", "bias")}


STATES = {
    "pypi 0.2.0": (pypi, _linears("q_proj", "k_proj", "v_proj") | _norms("norm") | _linears("out_proj")),
    "fork f6094f7": (fork, _linears(*PROJECTIONS) | _norms("q_ln", "k_ln")),
    "fork f6094f7, improved": (
        improved,
        {"qkv_proj.weight": (3 * E, E), "qkv_proj.bias": (3 * E,)} | _linears("out_proj") | _norms("q_ln", "k_ln"),
    ),
    "fork f6094f7, block sparse": (block_sparse, _linears(*PROJECTIONS)),
    "torchscale 4d1e0e8": (torchscale, _linears("k_proj", "v_proj", "q_proj", "out_proj") | _norms("inner_attn_ln")),
}


@pytest.mark.parametrize("name", STATES)
def test_published_checkpoints_load_strictly(name: str) -> None:
    build, shapes = STATES[name]
    checkpoint, file = {n: torch.randn(s) for n, s in shapes.items()}, io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    module = build()
    module.load_state_dict(torch.load(file), strict=True)
    assert list(module.state_dict()) == list(shapes)
    assert all(torch.equal(module.state_dict()[n], t) for n, t in checkpoint.items())


def test_a_checkpoint_of_the_other_code_does_not_load() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*norm\.weight.*Unexpected key.*q_ln\.weight"):
        pypi().load_state_dict(fork().state_dict())


# Constructors and calls as published: names in order, and defaults.
_COMMON = {
    "dropout": 0.0, "bias": True, "layer_norm": True, "layer_norm_eps": 1e-5, "gamma_init": 1.0, "device": None,
    "dtype": None,
}  # fmt: skip
_RATES_FIRST = ["embed_dim", "num_heads", "dilation_rates", "segment_lengths"]
_FORK_CALL = {"query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "is_causal"} | {
    "average_attn_weights"
}
SIGNATURES = {
    "pypi 0.2.0": (
        MultiheadDilatedAttention, _RATES_FIRST, _COMMON | {"op": None}, {"query", "key", "value", "is_causal"},
    ),
    "fork f6094f7": (MultiheadDilatedAttention, _RATES_FIRST, _COMMON | {"op": None}, _FORK_CALL),
    "fork f6094f7, improved": (
        ImprovedMultiheadDilatedAttention, _RATES_FIRST, _COMMON | {"use_tf32": False}, _FORK_CALL,
    ),  # use_tf32 was True: see the class
    "fork f6094f7, block sparse": (
        BlockSparseRingMultiheadDilatedAttention, ["embed_dim", "num_heads", "segment_lengths", "dilation_rates"],
        {"dropout": 0.0, "bias": True, "sparse_config": None, "batch_first": True}, _FORK_CALL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_published_signatures(name: str) -> None:
    kind, required, defaults, call = SIGNATURES[name]
    parameters = inspect.signature(kind).parameters
    assert list(parameters)[: 4 + len(defaults)] == [*required, *defaults]
    assert {n: parameters[n].default for n in defaults} == defaults
    assert call <= set(inspect.signature(kind.forward).parameters)
