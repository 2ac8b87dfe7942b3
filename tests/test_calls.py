"""What a call may bring: attention() and PlannedAttention, and every mismatch answered by what is needed."""

from __future__ import annotations

import copy

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec, Dim, api
from attnplan import patterns as P
from attnplan.errors import SpecError
from attnplan.nn import PlannedAttention
from tests.running import Call, error

SPEC = AttentionSpec(seq_len=16, kv_len=20, heads=4, kv_heads=2, head_dim=8, value_dim=6, dtype="float32")
Q, K, V = (2, 4, 16, 8), (2, 2, 20, 8), (2, 2, 20, 6)


@pytest.fixture(autouse=True)
def fresh_caches():
    attnplan.cache_clear()
    yield
    attnplan.cache_clear()


def call(spec=SPEC, q=Q, k=K, v=V, **options):
    """Call the plan of a spec with tensors, or random tensors of some shapes."""
    made = (torch.randn(x) if isinstance(x, tuple) else x for x in (q, k, v))
    return attnplan.compile(spec)(*made, **options)


SWAPPED = r"heads and rows look swapped: transpose\(1, 2\), or use layout='bshd'"
WRONG_TENSORS = {
    r"q has shape \[2, 4, 17, 8\], the spec needs \[B, 4, 16, 8\] \(layout bhsd\)": {"q": (2, 4, 17, 8)},
    r"q has shape \[4, 16, 8\], the spec needs \[B, 4, 16, 8\]": {"q": (4, 16, 8)},
    rf"q has shape \[2, 16, 4, 8\], the spec needs .*{SWAPPED}": {"q": (2, 16, 4, 8)},
    r"k has shape \[2, 4, 20, 8\], the spec needs \[B, 2, 20, 8\]": {"k": (2, 4, 20, 8)},
    r"v has shape \[2, 2, 20, 8\], the spec needs \[B, 2, 20, 6\]": {"v": (2, 2, 20, 8)},
    "batch sizes differ: q 2, k 3, v 2": {"k": (3, 2, 20, 8)},
    "batch sizes differ: q 1, k 2, v 2": {"q": (1, 4, 16, 8)},
    "batch sizes differ: q 2, k 2, v 1": {"v": (1, 2, 20, 6)},
    "q has dtype torch.float64, the spec has float32; convert it": {"q": torch.randn(Q).double()},
    "v has dtype torch.bfloat16, the spec has float32": {"v": torch.randn(V).bfloat16()},
    "k must be a tensor, got list": {"k": [[1.0]]},
    "q must be a tensor, got ndarray": {"q": torch.randn(Q).numpy()},
    "v must be a tensor, got NoneType": {"v": None},
    "k is on meta, the plan is for cpu": {"k": torch.randn(K, device="meta")},
}


@pytest.mark.parametrize("message", WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_refused(message):
    with pytest.raises(SpecError, match=message):
        call(**WRONG_TENSORS[message])


@pytest.mark.parametrize("message", WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_refused_after_a_good_call_too(message):
    call()
    with pytest.raises(SpecError, match=message):
        call(**WRONG_TENSORS[message])


def test_the_other_layout_is_suggested_from_either_side():
    with pytest.raises(SpecError, match=r"needs \[B, 16, 4, 8\] \(layout bshd\); .* use layout='bhsd'"):
        call(attrs.evolve(SPEC, layout="bshd"))


OPEN = attrs.evolve(SPEC, seq_len=Dim("s", max=16), kv_len=Dim("s", max=16), value_dim=8)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((17, 17), "seq_len=17 is not between 1 and the max=16 of Dim 's'"),
        ((0, 0), "seq_len=0 is not between 1 and the max=16 of Dim 's'"),
        ((4, 5), "Dim 's' is 4 in seq_len and 5 in kv_len; use two names"),
    ],
)
def test_lengths_beyond_an_open_one_are_refused(lengths, message):
    q, k = (torch.randn(1, h, n, 8) for h, n in zip((4, 2), lengths, strict=True))
    with pytest.raises(SpecError, match=message):
        attnplan.compile(OPEN)(q, k, k)


def test_the_shape_of_an_open_length_is_written_with_its_name():
    with pytest.raises(SpecError, match=r"q has shape \[1, 3, 8, 8\], the spec needs \[B, 4, s <= 16, 8\]"):
        call(OPEN, (1, 3, 8, 8), (1, 2, 8, 8), (1, 2, 8, 8))


def test_keys_and_values_of_unlike_length_are_refused():
    with pytest.raises(SpecError, match="k has 8 rows, v has 9"):
        call(OPEN, (1, 4, 8, 8), (1, 2, 8, 8), (1, 2, 9, 8))


def test_an_lse_that_does_not_exist_is_refused():
    spec = attrs.evolve(SPEC, pattern=P.mix([P.full(), P.window(2)], rule="mean"))
    call(spec)
    with pytest.raises(SpecError, match="there is no one LSE under mix='mean': return_lse needs the rule 'lse'"):
        call(spec, return_lse=True)


PACKED = attrs.evolve(SPEC, pattern=P.documents() & P.padding(), q_offset=True)
GOOD = {"documents": torch.tensor([0, 7, 20]), "key_padding": torch.ones(2, 20, dtype=torch.bool), "q_offset": 4}
WRONG_OPERANDS = {
    r"documents must rise from 0 to the 20 keys without overlap; got \[1, 20\]; add padding": {"documents": [1, 20]},
    r"documents must rise from 0 to the 20 keys .* got \[0, 19\]": {"documents": [0, 19]},
    r"documents must rise from 0 to the 20 keys .* got \[0, 9, 7, 20\]": {"documents": [0, 9, 7, 20]},
    r"documents must rise .* got \[\[0, 20\], \[0, 21\]\]": {"documents": [[0, 20], [0, 21]]},
    "documents has 3 rows for a batch of 2": {"documents": [[0, 20]] * 3},
    r"documents must be an int tensor .*; got torch.float32 \[2\]": {"documents": torch.tensor([0.0, 20.0])},
    r"documents must be an int tensor .*; got torch.int64 \[1\]": {"documents": [0]},
    r"documents must be an int tensor .*; got torch.int64 \[1, 1, 2\]": {"documents": [[[0, 20]]]},
    r"documents must be an int tensor .*; got \(0, 20\)": {"documents": (0, 20)},
    "documents is on meta, q is on cpu; move it there once": {"documents": torch.zeros(2, device="meta").int()},
    r"key_padding must be a bool tensor \[B, kv_len\] = \[2, 20\], True for real keys; got torch.int64 \[2, 20\]": {
        "key_padding": torch.ones(2, 20).long()
    },
    r"key_padding must be a bool tensor .*; got torch.bool \[2, 16\]": {"key_padding": torch.ones(2, 16).bool()},
    r"key_padding must be a bool tensor .*; got torch.bool \[3, 20\]": {"key_padding": torch.ones(3, 20).bool()},
    r"key_padding must be a bool tensor .*; got torch.bool \[20\]": {"key_padding": torch.ones(20).bool()},
    r"key_padding must be a bool tensor .*; got \(True,\)": {"key_padding": (True,)},
    r"q_offset must be from 0 to 4, so that every query is beside a key; got -1\.\.-1": {"q_offset": -1},
    r"q_offset must be from 0 to 4, .*; got 0\.\.5": {"q_offset": [0, 5]},
    "q_offset must be an int or an int tensor .*, got 1.5": {"q_offset": 1.5},
    "q_offset must be an int or an int tensor .*, got True": {"q_offset": True},
    r"q_offset must be an int tensor .*; got torch.float32 \[\]": {"q_offset": torch.tensor(1.0)},
    r"q_offset must be an int tensor .*; got torch.int64 \[3\]": {"q_offset": [1, 2, 3]},
    "unknown operand 'document'; did you mean 'documents'": {"document": [0, 20]},
    "unknown operand 'foo'; known: alibi_slopes, .*key_padding, q_offset, sink_logits": {"foo": 1},
    "this plan takes no bias: its spec would need bias=True": {"bias": torch.zeros(2)},
    "this plan takes no sink_logits: its spec would need sink_logits=True": {"sink_logits": torch.zeros(2)},
    "this plan takes no dropout_seed: its spec would need dropout above 0": {"dropout_seed": 3},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_OPERANDS)
def test_operands_that_do_not_fit_are_refused(message):
    call(PACKED, **GOOD)
    wrong = {n: torch.tensor(x) if isinstance(x, list) else x for n, x in WRONG_OPERANDS[message].items()}
    with pytest.raises(SpecError, match=message):
        call(PACKED, **{**GOOD, **wrong})


@pytest.mark.parametrize("seed", [1.5, True, torch.tensor([1]), torch.tensor(1.0)], ids=repr)
def test_a_seed_is_one_integer(seed):
    with pytest.raises(SpecError, match=r"dropout_seed must be an int or an int64 tensor \[\]; got "):
        call(attrs.evolve(SPEC, dropout=0.5), dropout_seed=seed)


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_operand_is_named(name):
    with pytest.raises(SpecError, match=rf"the spec needs {name} with each call: plan\(q, k, v, {name}=\.\.\.\)"):
        call(PACKED, **{n: x for n, x in GOOD.items() if n != name})


@pytest.mark.parametrize(
    ("name", "how"),
    [("documents", r"P.documents\(\)"), ("key_padding", r"P.padding\(\)"), ("q_offset", "q_offset=True")],
)
def test_an_operand_that_the_spec_lacks_is_refused(name, how):
    with pytest.raises(SpecError, match=f"this plan takes no {name}: its spec would need {how}"):
        call(**{name: GOOD[name]})


# ----------------------------------------------------------------------------------------------------- attention()


def inputs(batch=2, length=12, dtype=torch.float64):
    return tuple(torch.randn(batch, 2, length, 8, dtype=dtype) for _ in range(3))


def test_attention_finds_its_plan_again():
    q, k, v = inputs()
    first = attnplan.attention(q, k, v, pattern=P.window(3), causal=True)
    plans, calls = len(api._plans), len(api._calls)
    assert torch.equal(attnplan.attention(q, k, v, pattern=P.window(3), causal=True), first)
    assert (len(api._plans), len(api._calls)) == (plans, calls) == (1, 1)
    attnplan.attention(q, k, v, pattern=P.window(4), causal=True)
    assert (len(api._plans), len(api._calls)) == (2, 2)


def test_attention_shares_plans_with_compile():
    q, k, v = inputs()
    attnplan.attention(q, k, v, pattern=P.window(3), causal=True, scale=0.5, layout="bhsd")
    spec = AttentionSpec(
        seq_len=12, heads=2, head_dim=8, batch=2, dtype="float64", pattern=P.window(3), causal=True, scale=0.5
    )
    attnplan.compile(spec, "cpu")
    assert len(api._plans) == 1


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_attention_computes_what_a_plan_does(layout):
    spec = AttentionSpec(
        seq_len=12, kv_len=15, heads=4, kv_heads=2, head_dim=8, value_dim=6, dtype="float64", causal=True,
        pattern=P.longnet([4, 8], [1, 2]), scale=0.3, softcap=4.0,
    )  # fmt: skip
    one = Call.of(spec, batch=3)
    want = one.expected()
    given = [x.transpose(1, 2) if layout == "bshd" else x for x in one.inputs]
    options = {"pattern": spec.pattern, "causal": True, "scale": 0.3, "softcap": 4.0, "layout": layout}
    out, lse = attnplan.attention(*given, **options, return_lse=True)
    assert error(out.transpose(1, 2) if layout == "bshd" else out, want.out) < 1e-12
    assert error(lse, want.lse) < 1e-12
    assert error(attnplan.attention(*given, **options, backend="eager", strategy="dense"), out) < 1e-12
    assert error(attnplan.attention(*given, **options, backend="reference"), out) < 1e-12


def test_operands_add_their_conditions():
    q, k, v = inputs()
    documents, padding = torch.tensor([0, 5, 12]), torch.arange(12) < torch.tensor([[12], [7]])
    spec = AttentionSpec(
        seq_len=12, heads=2, head_dim=8, dtype="float64", pattern=P.window(3) & P.documents() & P.padding()
    )
    want = attnplan.compile(spec)(q, k, v, documents=documents, key_padding=padding)
    got = attnplan.attention(q, k, v, pattern=P.window(3), documents=documents, key_padding=padding)
    assert error(got, want) < 1e-12
    once = P.window(3) & P.documents()
    assert error(attnplan.attention(q, k, v, pattern=once, documents=documents, key_padding=padding), want) < 1e-12
    decoded = attnplan.attention(q[:, :, :1], k, v, causal=True, q_offset=torch.tensor([3, 11]))
    whole = attnplan.attention(q[:, :, :1].expand_as(q), k, v, causal=True)
    assert error(decoded[:, :, 0], torch.stack([whole[0, :, 3], whole[1, :, 11]])) < 1e-12


X = torch.ones(1, 2, 4, 8)
WRONG_ARGUMENTS = {
    r"q must be a tensor of 4 dimensions, got shape \[2, 4, 8\]": (X[0], X[0], X[0]),
    r"k must be a tensor of 4 dimensions, got shape \[4, 8\]": (X, X[0, 0], X[0, 0]),
    "q must be a tensor of 4 dimensions, got float": (1.0, 2.0, 3.0),
    "k must be a tensor of 4 dimensions, got NoneType": (X, None, None),
    "kv_heads=2 does not divide heads=3": (torch.ones(1, 3, 4, 8), X, X),
    r"k has shape \[1, 2, 4, 6\], the spec needs \[B, 2, 4, 8\]": (X, X[..., :6], X),
    r"v has shape \[1, 2, 3, 8\], the spec needs \[B, 2, 4, 8\]": (X, X, X[:, :, :3]),
    "unknown dtype 'int32'; ": (X.int(), X.int(), X.int()),
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_attention_says_what_it_cannot_take(message):
    with pytest.raises(SpecError, match=message):
        attnplan.attention(*WRONG_ARGUMENTS[message])


WRONG_OPTIONS = {
    "unknown layout 'sbhd'; did you mean 'b[hs][hs]d'": {"layout": "sbhd"},
    "unknown operand 'document'; did you mean 'documents'": {"document": torch.tensor([0, 12])},
    r"bias must be a floating-point tensor \[2, 12, 12\] or \[2, 2, 12, 12\], .*; got 1": {"bias": 1},
    "scale must be a positive finite number": {"scale": -1.0},
    "pattern must be a pattern or mixture, got 3": {"pattern": 3},
    "unknown backend 'flsh'": {"backend": "flsh"},
    "documents must rise from 0 to the 12 keys": {"pattern": P.segments(4), "documents": torch.tensor([0, 11])},
}


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_attention_says_which_option_is_wrong(message):
    with pytest.raises(SpecError, match=message):
        attnplan.attention(*inputs(), **WRONG_OPTIONS[message])


# ----------------------------------------------------------------------------------------------- PlannedAttention


def test_a_module_computes_attention():
    q, k, v = inputs()
    module = PlannedAttention("longnet([4, 8], [1, 2])", causal=True, scale=0.5)
    out, lse = module(q, k, v, return_lse=True)
    want = attnplan.attention(q, k, v, pattern=P.longnet([4, 8], [1, 2]), causal=True, scale=0.5, return_lse=True)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
    assert torch.equal(copy.deepcopy(module)(q, k, v), module(q, k, v))


def test_a_module_takes_operands_and_layouts():
    q, k, v = inputs()
    packed = PlannedAttention(P.documents(), causal=True, layout="bshd", softcap=3.0)
    documents = torch.tensor([0, 5, 12])
    want = attnplan.attention(q, k, v, pattern=P.documents(), causal=True, softcap=3.0, documents=documents)
    got = packed(*(x.transpose(1, 2) for x in (q, k, v)), documents=documents)
    assert error(got.transpose(1, 2), want) < 1e-12


def test_a_module_holds_no_state_and_says_what_it_does():
    module = PlannedAttention(P.window(4) | P.sinks(2), causal=True)
    assert list(module.parameters()) == []
    assert module.state_dict() == {}
    assert repr(module) == "PlannedAttention(window(4) | sinks(2), causal)"
    assert repr(PlannedAttention()) == "PlannedAttention(full())"


def test_a_module_serves_every_shape():
    module = PlannedAttention(P.window(4), causal=True)
    for batch, length in ((1, 5), (3, 5), (2, 17)):
        assert module(*inputs(batch, length)).shape == (batch, 2, length, 8)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("windw(3)", "did you mean 'window'"), (7, "pattern must be a pattern, a mixture or its text form, got 7")],
)
def test_a_module_refuses_what_is_no_pattern(pattern, message):
    with pytest.raises(SpecError, match=message):
        PlannedAttention(pattern)
