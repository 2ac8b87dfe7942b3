from __future__ import annotations

import json
import math
import tomllib

import attrs
import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.errors import SpecError
from attnplan.spec import AttentionSpec, Dim
from tests import strategies as some

BASE = AttentionSpec(seq_len=12, heads=4, head_dim=8)


def spec(**changes):
    return AttentionSpec(**{"seq_len": 12, "heads": 4, "head_dim": 8, **changes})


def test_defaults_are_those_of_the_queries():
    assert (BASE.kv_len, BASE.kv_heads, BASE.value_dim) == (12, 4, 8)
    assert BASE.pattern == P.full()
    assert (BASE.dtype, BASE.layout, BASE.precision, BASE.batch) == ("bfloat16", "bhsd", "ieee", 1)
    assert (BASE.causal, BASE.training, BASE.q_offset, BASE.ring_size, BASE.dropout) == (False, False, False, 1, 0.0)
    assert BASE.softmax_scale == 1 / math.sqrt(8)
    assert spec(scale=2).softmax_scale == 2.0
    assert BASE.operands == frozenset()


def test_a_pattern_may_be_given_as_text():
    assert spec(pattern="window(3) | sinks(1)") == spec(pattern=P.window(3) | P.sinks(1))


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_a_torch_dtype_is_its_name(name):
    assert spec(dtype=getattr(torch, name)) == spec(dtype=name)
    assert spec(dtype=getattr(torch, name)).dtype == name


def test_equal_specs_hash_alike_and_differ_in_any_field():
    assert spec(kv_len=12, kv_heads=4, value_dim=8) == BASE
    assert hash(spec(kv_len=12)) == hash(BASE)
    other = {
        "seq_len": 11, "heads": 8, "head_dim": 4, "pattern": P.causal(), "causal": True, "kv_len": 13, "kv_heads": 2,
        "value_dim": 4, "batch": 2, "dtype": "float32", "layout": "bshd", "scale": 0.5, "softcap": 3.0, "dropout": 0.1,
        "precision": "tf32", "training": True, "ring_size": 2, "q_offset": True, "bias": True,
        "alibi_slopes": True, "sink_logits": True,
    }  # fmt: skip
    assert sorted(other) == sorted(a.name for a in attrs.fields(AttentionSpec))
    assert len({BASE, *(spec(**{name: value}) for name, value in other.items())}) == len(other) + 1


def test_branches_include_causality_and_bind_heads():
    mixture = P.longnet([8, 16], [1, 2], offset="block")
    first, second = spec(pattern=mixture, causal=True).branches
    assert first == P.segments(8) & P.causal()
    assert second == P.dilated(16, 2, "block", heads=4) & P.causal()
    assert spec(pattern=P.dilated(8, 2, "block")).branches == (P.dilated(8, 2, "block", heads=4),)


@pytest.mark.parametrize(
    ("pattern", "rule", "has_lse"),
    [
        (P.causal(), "lse", True),
        (P.longnet([8], [1], mix="lse-detached"), "lse-detached", True),
        (P.grouped([8], [1], mix="mean"), "mean", False),
        (P.mix([P.full()], rule="sum"), "sum", False),
    ],
)
def test_only_mean_and_sum_have_no_lse(pattern, rule, has_lse):
    assert (spec(pattern=pattern).rule, spec(pattern=pattern).has_lse) == (rule, has_lse)


def test_operands_are_those_of_the_pattern_and_the_offset():
    assert spec(pattern=P.documents() & P.padding(), q_offset=True).operands == {"documents", "key_padding", "q_offset"}


def test_pairs_are_counted_over_branches_heads_and_batch():
    assert BASE.count_pairs() == 4 * 144
    assert spec(causal=True, batch=2).count_pairs() == 2 * 4 * 78
    assert spec(pattern=P.longnet([12, 12], [1, 2])).count_pairs() == 4 * 144 + 4 * 36


@pytest.mark.parametrize("changes", [{"q_offset": True}, {"seq_len": Dim("s", max=12)}, {"pattern": P.documents()}])
def test_pairs_that_depend_on_the_call_are_not_counted(changes):
    with pytest.raises(SpecError, match="depend"):
        spec(**changes).count_pairs()


BAD_SPECS = {
    "heads must be an int, got 2.0": {"heads": 2.0},
    "heads must be at least 1, got 0": {"heads": 0},
    "head_dim must be an int, got '8'": {"head_dim": "8"},
    "kv_heads must be at least 1": {"kv_heads": 0},
    "value_dim must be at least 1": {"value_dim": -1},
    "batch must be an int, got True": {"batch": True},
    "ring_size must be at least 1": {"ring_size": 0},
    "seq_len must be at least 1": {"seq_len": 0},
    "kv_len must be an int, got None": {"kv_len": None},
    "kv_heads=3 does not divide heads=4; grouped-query attention needs heads % kv_heads == 0": {"kv_heads": 3},
    "Dim 's' has max=8 for seq_len and max=9 for kv_len": {"seq_len": Dim("s", max=8), "kv_len": Dim("s", max=9)},
    "ring_size=2 needs a fixed seq_len": {"seq_len": Dim("s", max=8), "ring_size": 2},
    "unknown dtype 'floa32'; did you mean 'float32'": {"dtype": "floa32"},
    "unknown dtype 'int8'": {"dtype": torch.int8},
    "unknown dtype 'None'": {"dtype": None},
    "unknown layout 'sbhd'; did you mean 'bshd'": {"layout": "sbhd"},
    "unknown precision 'fp8'; known: ieee, tf32": {"precision": "fp8"},
    "scale must be a positive finite number or None, got 0": {"scale": 0},
    "scale must be .* got inf": {"scale": math.inf},
    "scale must be .* got 'x'": {"scale": "x"},
    "softcap must be .* got -1.0": {"softcap": -1.0},
    "softcap must be .* got nan": {"softcap": math.nan},
    r"dropout must be a probability in \[0, 1\), got 1": {"dropout": 1},
    "dropout must be .* got -0.1": {"dropout": -0.1},
    "dropout must be .* got None": {"dropout": None},
    "causal must be True or False, got 1": {"causal": 1},
    "training must be True or False, got 'yes'": {"training": "yes"},
    "q_offset must be True or False, got 5": {"q_offset": 5},
    r"pattern must be a pattern or mixture, got 5; write pattern=P.window\(512\)": {"pattern": 5},
    "unknown pattern 'windw'; did you mean 'window'": {"pattern": "windw(3)"},
    "names heads that do not exist": {"pattern": P.heads(0, 5)},
    "document lengths sum to 3": {"pattern": P.longnet([8], [1]) & P.documents([3])},
    "padding has 2 lengths for batch=1": {"pattern": P.padding([3, 4])},
    "spreads its offsets over 8 heads": {"pattern": P.dilated(8, 2, "block", heads=8)},
    r"documents\(\[12\]\) fixes lengths, but seq_len or kv_len is a Dim": {
        "pattern": P.documents([12]), "seq_len": Dim("s", max=12),
    },
    "fixes lengths, but seq_len or kv_len is a Dim": {
        "pattern": P.mix([P.full(), P.causal() & P.padding([3])]), "kv_len": Dim("s", max=12),
    },
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_SPECS)
def test_a_contradictory_spec_says_why(message):
    with pytest.raises(SpecError, match=message):
        spec(**BAD_SPECS[message])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dim("", max=3), "a Dim needs a name such as \"s\", got ''"),
        (lambda: Dim(3, max=3), "a Dim needs a name"),
        (lambda: Dim("s", max=0), "max of Dim 's' must be at least 1"),
        (lambda: Dim("s", max="4"), "max of Dim 's' must be an int"),
    ],
)
def test_a_bad_dim_says_why(make, message):
    with pytest.raises(SpecError, match=message):
        make()


S, T = Dim("s", max=12), Dim("t", max=20)


def test_a_dim_counts_as_its_maximum():
    found = spec(seq_len=S, kv_len=T)
    assert not found.is_static
    assert found.shape == P.Shape(12, 20, 4, 1)
    assert spec(seq_len=S).kv_len == S


def test_at_replaces_dims_by_the_lengths_of_a_call():
    assert spec(seq_len=S, kv_len=T).at(3, 17) == spec(seq_len=3, kv_len=17)
    assert spec(seq_len=S).at(5, 5) == spec(seq_len=5)
    assert spec(seq_len=S).at(1, 1) == spec(seq_len=1)
    assert spec(seq_len=S).at(12, 12) == BASE
    assert BASE.at(12, 12) == BASE


@pytest.mark.parametrize(
    ("changes", "lengths", "message"),
    [
        ({"seq_len": S}, (13, 13), "seq_len=13 is not between 1 and the max=12 of Dim 's'"),
        ({"seq_len": S, "kv_len": T}, (12, 0), "kv_len=0 is not between 1 and the max=20 of Dim 't'"),
        ({"seq_len": S}, (5, 6), "Dim 's' is 5 in seq_len and 6 in kv_len; use two names"),
        ({}, (12, 11), "kv_len is 11, the spec has 12"),
        ({"kv_len": T}, (11, 11), "seq_len is 11, the spec has 12"),
        ({"seq_len": S, "pattern": P.heads(0, 9)}, (5, 5), "names heads that do not exist"),
        ({"seq_len": S, "kv_len": T, "pattern": P.documents()}, (9, 8), "seq_len=9 exceeds kv_len=8"),
    ],
)
def test_at_refuses_lengths_that_do_not_fit(changes, lengths, message):
    with pytest.raises(SpecError, match=message):
        spec(**changes).at(*lengths)


@st.composite
def varied_specs(draw):
    """Specs with every field varied."""
    found = draw(some.specs())
    numerics = {
        "dtype": draw(st.sampled_from(["float64", "float32", "float16", "bfloat16"])),
        "layout": draw(st.sampled_from(["bhsd", "bshd"])),
        "precision": draw(st.sampled_from(["ieee", "tf32"])),
        "dropout": draw(st.sampled_from([0.0, 0.1, 1e-7])),
        "scale": draw(st.one_of(st.none(), st.floats(1e-12, 1e12))),
        "training": draw(st.booleans()),
        "ring_size": draw(st.integers(1, 4)),
    }
    return attrs.evolve(found, **numerics)


@given(varied_specs())
def test_toml_json_and_plain_data_read_back_to_an_equal_spec(found):
    assert AttentionSpec.from_text(found.to_toml()) == found
    assert AttentionSpec.from_text(found.to_json(), kind="json") == found
    assert AttentionSpec.from_dict(found.to_dict()) == found
    assert tomllib.loads(found.to_toml()) == json.loads(found.to_json()) == found.to_dict()
    assert AttentionSpec.from_text(tomli_w.dumps(found.to_dict())) == found


@pytest.mark.parametrize("kv_len", [S, T, 40])
@pytest.mark.parametrize("name", ["s", "länge", "\U0001d494"])
def test_a_dim_is_a_table_in_toml(name, kv_len, tmp_path):
    found = spec(seq_len=Dim(name, max=12), kv_len=kv_len)
    (tmp_path / "spec.toml").write_text(found.to_toml(), encoding="utf-8")
    assert AttentionSpec.from_file(tmp_path / "spec.toml") == found
    assert AttentionSpec.from_text(found.to_json(), kind="json") == found


def test_only_fields_beyond_their_default_are_written():
    assert BASE.to_dict() == {"seq_len": 12, "heads": 4, "head_dim": 8}
    assert spec(causal=True, seq_len=S).to_toml() == (
        'seq_len = { name = "s", max = 12 }\nheads = 4\nhead_dim = 8\ncausal = true\n'
    )


def test_a_mask_cannot_be_saved():
    with pytest.raises(SpecError, match="holds a Python function and cannot be saved"):
        spec(pattern=P.causal() & P.mask(lambda h, q, k: q > k)).to_toml()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "a spec is a table of keys such as seq_len = 8192, got list"),
        ({"seq_len": 8, "heads": 2}, "the spec has no head_dim; it needs seq_len, heads and head_dim"),
        ({"heads": 2, "head_dim": 2}, "the spec has no seq_len"),
        ({"seq_len": 8, "heads": 2, "head_dim": 2, "cuasal": True}, "unknown spec key 'cuasal'; did you mean 'causal'"),
        ({"seq_len": 8, "heads": 2, "head_dim": 2, 7: True}, "unknown spec key 7; known: alibi_slopes, batch"),
        ({"seq_len": {"max": 8}, "heads": 2, "head_dim": 2}, 'seq_len must be an int or a table such as { name = "s"'),
        ({"seq_len": {"name": "s", "max": "8"}, "heads": 2, "head_dim": 2}, "max of Dim 's' must be an int"),
        ({"seq_len": [8], "heads": 2, "head_dim": 2}, "seq_len must be an int, got"),
        ({"seq_len": 8, "heads": 2, "head_dim": 2, "pattern": ["full()"]}, "pattern must be a pattern or mixture"),
    ],
)
def test_plain_data_that_is_no_spec_says_why(data, message):
    with pytest.raises(SpecError, match=message):
        AttentionSpec.from_dict(data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", b"seq_len = ", "a.toml is not valid TOML: "),
        ("a.toml", b"\x7fELF\x02", "a.toml is not valid TOML"),
        ("a.toml", b"\xff\xfe", "cannot read the spec file .*a.toml': it is not UTF-8 text"),
        ("a.json", b"{", "a.json is not valid JSON: "),
        ("a.json", b"[" * 100_000, "a.json is not valid JSON"),
        ("a.json", b"3", "a.json: a spec is a table of keys"),
        ("a.toml", b"seq_len = 8\nheads = 2\nhead_dim = 0", "a.toml: head_dim must be at least 1"),
        ("a.toml", b"seq_len = 8\nheads = 2\nhead_dim = 4\nscale = inf", "a.toml: scale must be a positive finite"),
    ],
)
def test_a_file_that_is_no_spec_says_why(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError, match=message):
        AttentionSpec.from_file(tmp_path / name)


def test_a_file_that_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(SpecError, match=r"cannot read the spec file .*: No such file or directory"):
        AttentionSpec.from_file(tmp_path / "none.toml")
    with pytest.raises(SpecError, match=r"cannot read the spec file .*: Is a directory"):
        AttentionSpec.from_file(tmp_path)
