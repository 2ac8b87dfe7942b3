"""When ``backend="auto"`` takes what compiles at its first call, and what it says and does then."""

from __future__ import annotations

import json

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec, Dim
from attnplan import patterns as P
from attnplan.api import CALLS_OF_A_SHAPE
from attnplan.backends import base, compiled, eager, registry
from attnplan.backends.compiled import emit
from attnplan.cost import Target, calibration, catalogue
from attnplan.explain_mesh import kernels
from attnplan.nn import DilatedAttention
from attnplan.plan import Plan
from attnplan.runtime import compiling
from attnplan.runtime.flex import FlexAttend, Options
from attnplan.search import CALLS, search
from attnplan.search_ring import search_ring
from tests.conftest import ROOT
from tests.running import Call

H100 = Target(catalogue()["h100"], "cpu")
"""An H100 that is here: what calls it runs on the CPU."""
LONG = AttentionSpec(seq_len=65_536, heads=16, head_dim=128, dtype="bfloat16")
ISSUE = {
    "window": attrs.evolve(LONG, pattern=P.window(4096, 0)),
    "documents": attrs.evolve(LONG, pattern=P.documents(), causal=True),
    "longformer": attrs.evolve(LONG, pattern=P.window(1024) | P.global_tokens(128)),
    "random blocks": attrs.evolve(LONG, pattern=P.random_blocks(0.1, block_size=128)),
}
PINS = {"backend": "auto", "strategy": "auto", "max_memory": None}
SHORT = AttentionSpec(seq_len=1024, heads=8, head_dim=64, dtype="bfloat16")


@pytest.fixture
def bare(monkeypatch):
    """Pretend that torch and Triton are here, and no other package."""
    versions = {"torch": "2.11.0"}
    monkeypatch.setattr(base, "_version", versions.get)
    monkeypatch.setattr(base, "import_failure", lambda name: None)
    monkeypatch.setattr("attnplan.search.import_failure", lambda name: None)
    attnplan.cache_clear()
    yield
    attnplan.cache_clear()


@pytest.fixture
def published(monkeypatch):
    """Price by published numbers."""
    monkeypatch.setattr(calibration, "shipped", lambda name: None)
    calibration._parameters_for.cache_clear()
    attnplan.cache_clear()
    yield
    calibration._parameters_for.cache_clear()
    attnplan.cache_clear()


def reason(spec, target=H100, **options):
    found = search(spec, target, **options)
    (one,) = (c for c in found.candidates if (c.strategy, c.backend, c.schedule) == ("dense", "compiled", "flex"))
    return "; ".join(one.reasons)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ISSUE)
def test_auto_takes_flex_where_it_was_measured_to_be_faster(name, training, bare):
    """The cases of bench/results/compiled-h100.json: without flash-attn everything else takes longer."""
    found = search(attrs.evolve(ISSUE[name], training=training), H100)
    assert (found.backend.name, found.schedule.name) == ("compiled", "flex")
    assert found.candidate.prediction.compile_seconds == (6.0, 10.0)[training]


def test_published_prices_of_flex_are_those_of_the_rows_that_they_are_from(published):
    rows = json.loads((ROOT / "bench" / "results" / "compiled-h100.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        if row["case"] in ("window", "longformer", "random blocks"):  # of documents, calls say how many there are
            for way, training in (("forward", False), ("training", True)):
                spec = attrs.evolve(ISSUE[row["case"]], training=training)
                found = {c.name: c.prediction for c in search(spec, Target(H100.device, None)).candidates}
                predicted = found["dense > compiled (flex)"].seconds
                assert predicted == pytest.approx(row[way]["compiled"]["median"], rel=0.15), (row["case"], way)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("pattern", "calls"), [(P.full(), CALLS), (P.window(127), CALLS), (P.window(64) | P.global_tokens(16), CALLS // 10)]
)
def test_a_short_call_waits_for_no_compiler(pattern, calls, training, bare):
    """Under a mask in memory, whose operators keep the host busy, not if there are a tenth as many calls."""
    spec = attrs.evolve(SHORT, pattern=pattern, training=training)
    found = search(spec, H100, calls=calls)
    assert found.backend.name == "eager"
    assert not reason(spec, calls=calls)


def test_compiling_is_spread_over_calls_and_is_no_part_of_their_time(bare, published):
    """Longformer gains a tenth of a millisecond a call by price, which pays for six seconds in 60,000 calls."""
    spec = ISSUE["longformer"]
    many, few = search(spec, H100), search(spec, H100, calls=10_000)
    assert (many.backend.name, few.backend.name) == ("compiled", "eager")
    flex, other = many.candidate.prediction, few.candidate.prediction
    assert flex.seconds < other.seconds < flex.seconds + 6.0 / 10_000
    assert flex.seconds + 6.0 / CALLS < other.seconds
    order = [c.prediction.seconds + c.prediction.compile_seconds / CALLS for c in many.candidates if not c.reasons]
    assert order == sorted(order)


def test_a_loop_that_fits_a_budget_is_weighed_with_compiling_too(bare):
    """Masked tiles need a gigabyte at once; FlexAttention fits, and is worth its seconds for many calls only."""
    spec = ISSUE["longformer"]
    least = {c.name: c.prediction for c in search(spec, H100).candidates if not c.reasons}
    flex, eager_way = least["dense > compiled (flex)"], least["decompose-pull > eager (flash)"]
    assert flex.peak_bytes < eager_way.peak_bytes
    found = search(spec, H100, max_memory=eager_way.peak_bytes - 1, calls=10)
    assert found.candidate.loop
    assert found.candidate.prediction.seconds > flex.seconds
    assert search(spec, H100, max_memory=eager_way.peak_bytes - 1).candidate.name == "dense > compiled (flex)"


def test_calls_of_a_shape_wait_only_where_they_gain_much(bare):
    blocks = search(ISSUE["random blocks"], H100, calls=CALLS_OF_A_SHAPE)
    window = search(ISSUE["window"], H100, calls=CALLS_OF_A_SHAPE)
    assert (blocks.backend.name, window.backend.name) == ("compiled", "eager")


def test_attention_and_modules_spread_less_than_plans_do():
    q = torch.randn(1, 2, 16, 8)
    spec = AttentionSpec(seq_len=24, heads=2, head_dim=8, dtype="float32")  # on a CPU equal specs share a plan
    assert attnplan.api.plan_for(q, q, q, {})._searched["calls"] == CALLS_OF_A_SHAPE < CALLS
    assert attnplan.compile(spec)._searched["calls"] == CALLS
    module = DilatedAttention([8], [2])
    assert module.plan(16, heads=2, head_dim=8)._searched["calls"] == CALLS_OF_A_SHAPE


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"seq_len": Dim("s", max=65_536), "kv_len": Dim("s", max=65_536)}, "each length would be compiled by itself"),
        ({"dtype": "float32"}, "timed with float16 and bfloat16, the spec has float32"),
        ({"head_dim": 96, "value_dim": 96}, "timed with head_dim of 64 and 128, the spec has 96 and 96"),
        ({"value_dim": 256}, "the spec has 128 and 256"),
        ({"seq_len": 127}, "timed with 128 queries and more, the spec has 127"),
        ({"softcap": 30.0}, "timed without score functions, the spec has softcap"),
        (
            {"alibi_slopes": True, "bias": True, "seq_len": 1024, "kv_len": 1024},
            "without score functions, the spec has alibi_slopes and bias",
        ),
    ],
)
def test_what_was_not_timed_runs_by_name_only(changes, why, bare):
    spec = attrs.evolve(LONG, pattern=P.window(4096, 0), **changes)
    assert reason(spec).startswith("runs only when asked for by backend='compiled': ")
    assert why in reason(spec)
    asked = search(spec, H100, "compiled")
    assert asked.backend.name == "compiled"


@pytest.mark.parametrize("changes", [{"seq_len": 128}, {"dtype": "float16"}, {"head_dim": 64, "value_dim": 128}])
def test_what_was_timed_is_a_candidate(changes, bare):
    assert not reason(attrs.evolve(LONG, pattern=P.window(4096, 0), **changes))


def test_schedules_that_never_ran_and_those_of_the_cpu_run_by_name_only():
    backend = registry().get("compiled")
    both = [s for kind in ("h100", "cpu-2core") for s in backend.schedules(catalogue()[kind])]
    assert [s.name for s in both if backend.is_automatic(s)] == ["flex"]
    assert backend.is_automatic(compiled.FLEX_CUDA)
    assert not backend.is_automatic(attrs.evolve(compiled.FLEX_CUDA, tested=""))
    assert not backend.is_automatic(attrs.evolve(compiled.FLEX_CUDA, automatic=False))
    cpu = Target(catalogue()["cpu-2core"], None)
    found = search(attrs.evolve(LONG, dtype="float32", seq_len=2048, pattern=P.window(9)), cpu)
    reasons = {c.reasons for c in found.candidates if c.backend == "compiled" and c.strategy == "dense"}
    assert all("runs only when asked for by backend='compiled'" in r for r in reasons)


def test_without_triton_there_is_no_flex(bare, monkeypatch):
    monkeypatch.setattr(base, "import_failure", lambda name: f"no {name}")
    assert reason(ISSUE["window"]) == "import of triton failed: no triton"


def test_deterministic_plans_leave_it_out(bare):
    assert "not known to repeat" in reason(ISSUE["window"], deterministic=True)


def test_rings_keep_it_for_those_who_ask(bare):
    spec = attrs.evolve(LONG, pattern=P.window(4096, 0))
    assert not any("compiled" in kernel.name for kernel in kernels(spec, H100.device))
    found = search_ring(attrs.evolve(spec, ring_size=4), H100, 4, PINS)
    assert ("compiled (flex)", ("runs only when asked for by backend='compiled'",)) in found.refused


def test_a_compiler_that_fails_is_named_and_the_next_candidate_runs(bare, monkeypatch):
    def without_compiler(function, **options):
        def call(*args):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

        return call

    monkeypatch.setattr(compiling.torch, "compile", without_compiler)
    monkeypatch.setattr(eager.Eager, "schedules", lambda self, device: (eager.MATH_CUDA,))
    spec = AttentionSpec(seq_len=256, heads=2, head_dim=64, dtype="bfloat16", pattern=P.random_blocks(0.3, 64, 0))
    found = search(spec, H100, "compiled", calls=7)
    plan = Plan(spec, H100, found, PINS)
    assert plan.choice == "dense > compiled (flex)"
    call = Call.of(spec, batch=1)
    q, k, v = call.inputs
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=r"compiled \(flex\) failed.*C compiler") as warned:
        got = plan(q, k, v)
    assert "this plan now runs dense > eager (math)" in str(warned[0].message)
    assert len(warned) == 1
    after = {c.name: c.reasons for c in plan._next.candidates}
    for same in ("dense > compiled (flex)", "blocks > compiled (flex)"):  # one kernel, whatever names its tiles
        assert any("failed in a call" in why for why in after[same])
    assert not any("failed" in why for why in after["dense > compiled (flex-flash)"])
    want = call.expected().out
    assert (got.double() - want).norm() / want.norm() < 1e-2
    assert plan._next._searched["calls"] == 7, "what follows is chosen for as many calls"
    strict = Plan(spec, H100, found, PINS, strict=True)
    with torch.no_grad(), pytest.raises(attnplan.KernelError, match="C compiler"):
        strict(q, k, v)


def test_an_exported_program_holds_the_operator_and_not_flex():
    """Without a compiler FlexAttention writes every score: 128 GiB for 65,536 tokens and 16 heads."""
    spec = AttentionSpec(seq_len=256, heads=2, head_dim=16, dtype="float32", pattern=P.window(9))
    plan = attnplan.compile(spec)
    options = Options((256, 256), (128, 128), 0.25, None, False)
    plan._inlined = emit.Inlined(FlexAttend(spec.pattern, spec.shape, 0, options, "cpu"))

    class Layer(torch.nn.Module):
        def forward(self, q):
            return plan(q, q, q)

    q = torch.randn(1, 2, 256, 16)
    assert plan._inlined.takes(q, q, q, False)
    exported = torch.export.export(Layer(), (q,))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "attnplan.planned.default" in targets
    assert not any("flex" in name for name in targets)


def test_a_report_says_the_seconds_of_compiling_apart(bare):
    spec = ISSUE["random blocks"]
    plan = Plan(spec, H100, search(spec, H100), PINS)
    page, facts = plan.explain(), plan.explain("json")
    assert "compiles once for each layout of its tensors, at its first call, about 6 s\n" in page
    assert facts["choice"]["compile_seconds"] == 6.0
    assert facts["choice"]["seconds"] < 0.02
    others = {o["name"]: o["compile_seconds"] for o in facts["others"]}
    assert others["blocks > eager (efficient)"] == 0.0
    assert others["naive > reference (float64)"] is None
    longformer = ISSUE["longformer"]
    eager_page = Plan(longformer, H100, search(longformer, H100, calls=10_000), PINS).explain()
    assert "dense > compiled (flex)" in eager_page
    assert ", compiles once, about 6 s\n" in eager_page
    again = attnplan.store.parse(plan._text(), "here", attnplan.api.fingerprint(), "keep")
    assert again.found.candidate.prediction.compile_seconds == 6.0
