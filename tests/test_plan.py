"""What compile accepts and refuses, and what a plan says about itself."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import MemoryBudgetError, NoBackendError, RingError, SpecError
from attnplan.strategies import STRATEGIES
from attnplan.units import parse_bytes
from tests.conftest import ROOT
from tests.running import Call
from tests.small_plans import SMALL, open_spec, tensors

pytestmark = pytest.mark.usefixtures("fresh_caches")


# ---------------------------------------------------------------------------------------------- arguments of compile


def test_a_plan_for_hardware_elsewhere_can_be_read_and_not_called():
    plan = attnplan.compile(attrs.evolve(SMALL, dtype="bfloat16", head_dim=64), device="h100")
    assert plan.device.name == "h100"
    assert "H100" in plan.explain()
    assert "def forward" in plan.source
    assert plan.predicted.seconds > 0
    with pytest.raises(NoBackendError, match=r"this plan is for NVIDIA H100 .* not here: inspect it, or compile"):
        plan(*tensors(plan.spec))
    with pytest.raises(NoBackendError, match=r"the coverage is proved, but NVIDIA H100 .* is not here"):
        plan.verify()


REFUSED_ARGUMENTS = {
    "unknown device 'h10'; did you mean 'h100'": (SpecError, {"device": "h10"}),
    "unknown device 'tpu-v5'; known: a100, .*h100": (SpecError, {"device": "tpu-v5"}),
    "unknown backend 'eagr'; did you mean 'eager'": (SpecError, {"backend": "eagr"}),
    "unknown strategy 'latice'; did you mean 'lattice'": (SpecError, {"strategy": "latice"}),
    "mesh must be a torch.distributed DeviceMesh, got object": (SpecError, {"mesh": object()}),
    "cannot read '2 GB of RAM' as a memory size": (SpecError, {"max_memory": "2 GB of RAM"}),
    "must be positive, got 0": (SpecError, {"max_memory": 0}),
    r"eager \(flash\): .*deterministic=True was asked for, and it is not known to repeat": (
        NoBackendError,
        {"spec": attrs.evolve(SMALL, precision="tf32"), "deterministic": True, "device": "h100"},
    ),
    "a process-wide flag that a plan must not change": (
        NoBackendError,
        {"spec": attrs.evolve(SMALL, precision="tf32"), "device": "h100"},
    ),
    "compile needs an AttentionSpec, got dict; .* attnplan.attention": (SpecError, {"spec": {"seq_len": 8}}),
}


@pytest.mark.parametrize("message", REFUSED_ARGUMENTS)
def test_an_argument_works_or_says_what_is_missing(message):
    kind, arguments = REFUSED_ARGUMENTS[message]
    with pytest.raises(kind, match=message):
        attnplan.compile(**{"spec": SMALL, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused_with_the_names_that_work():
    with pytest.raises(SpecError, match=r"torch finds no CUDA device here; .* name it: .*h100"):
        attnplan.compile(SMALL, device="cuda:0")


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pins_are_kept_or_refused(backend, strategy):
    for_cuda = strategy in ("lattice-views", "lattice-batch", "decompose-pull")
    if (backend == "reference") != (strategy == "naive") or for_cuda:
        with pytest.raises(NoBackendError, match=rf"strategy='{strategy}' was asked for"):
            attnplan.compile(SMALL, backend=backend, strategy=strategy)
        return
    plan = attnplan.compile(SMALL, backend=backend, strategy=strategy)
    assert (plan.backend, plan.strategy) == (backend, strategy)
    assert plan.pins == {"backend": backend, "strategy": strategy, "max_memory": None}


def test_strict_and_deterministic_plans_repeat_bit_for_bit():
    plan = attnplan.compile(SMALL, deterministic=True, strict=True)
    call = Call.of(SMALL, batch=2)
    first = call.got(plan)
    for _ in range(30):
        second = call.got(plan)
        assert torch.equal(first.lse, second.lse)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first.items(), second.items(), strict=True))


def test_a_memory_budget_moves_the_choice():
    spec = AttentionSpec(seq_len=512, heads=4, head_dim=32, dtype="float32", pattern=P.window(16), softcap=5.0)
    free = attnplan.compile(spec)
    assert attnplan.compile(spec, max_memory=free.predicted.peak_bytes).predicted == free.predicted
    with pytest.raises(
        MemoryBudgetError, match=r"the smallest plan, .*, needs [\d.]+ KiB .* budget 1 KiB; try a shorter"
    ):
        attnplan.compile(spec, max_memory="1 KiB")
    tight = attnplan.compile(SMALL, max_memory="4 MiB")
    assert all("max_memory=4 MiB" in c.reasons[0] for c in tight.candidates if c.reasons and "needs" in c.reasons[0])


def test_the_budget_that_the_message_proposes_is_enough():
    for length in range(300, 360, 6):
        spec = AttentionSpec(seq_len=length, heads=3, head_dim=32, dtype="float32", softcap=5.0)
        with pytest.raises(MemoryBudgetError) as caught:
            attnplan.compile(spec, max_memory=1)
        proposed = str(caught.value).rpartition("max_memory='")[2].rstrip("'")
        assert attnplan.compile(spec, max_memory=proposed).predicted.peak_bytes <= parse_bytes(proposed)


def test_a_device_that_is_too_small_says_so():
    spec = AttentionSpec(seq_len=2**20, heads=8, head_dim=64, dropout=0.1)  # dropout is not cut into pieces
    with pytest.raises(MemoryBudgetError, match=r"needs [\d,.]+ [GT]iB beside .* t4 has 16 GiB; .* a sparser pattern"):
        attnplan.compile(attrs.evolve(spec, dtype="float16"), device="t4")


def test_when_nothing_can_run_every_backend_says_why():
    spec = AttentionSpec(seq_len=64, heads=2, head_dim=12, dtype="bfloat16", precision="tf32", softcap=2.0)
    with pytest.raises(NoBackendError) as caught:
        attnplan.compile(spec, device="gtx1080")
    lines = str(caught.value).splitlines()
    assert lines[0] == "no backend can run this on gtx1080:"
    assert [line.partition(":")[0].strip() for line in lines[1:]] == [
        "naive > reference (float64)",
        *(f"dense > eager ({name})" for name in ("cudnn", "flash", "efficient", "math")),
        *(f"dense > xformers ({name})" for name in ("flash", "cutlass", "split-k")),
        *(f"dense > flash ({name})" for name in ("fa4", "fa3", "fa2")),
        *(f"dense > compiled ({name})" for name in ("flex", "flex-flash", "sdpa-cudnn", "sdpa-flash")),
    ]
    assert lines[1].endswith("runs only when asked for by backend='reference'")
    for reason in ("gtx1080 has no bfloat16", "no softcap", "capability 8.0, gtx1080 has 6.1", "TF32"):
        assert reason in lines[3], "all reasons, not the first"


# ------------------------------------------------------------------------------------------------ what a plan says


def test_a_plan_carries_what_explains_it():
    plan = attnplan.compile(SMALL)
    assert plan.spec is SMALL
    assert plan.device.kind == "cpu"
    assert plan.predicted.seconds > sum(op.seconds for op in plan.predicted.ops) > 0
    assert plan.predicted.peak_bytes > 0
    assert [s.name for s in plan.steps] == ["canonicalize", "split-heads", "lattice", "fuse-merge"]
    assert plan.steps[-1].graph == plan.graph
    assert [(a.after, b.before) for a, b in itertools.pairwise(plan.steps) if a.after != b.before] == []
    plan.graph.verify()
    priced = [c for c in plan.candidates if c.prediction]
    assert priced == list(plan.candidates[: len(priced)]), "the accepted come first"
    assert [c.prediction.seconds for c in priced] == sorted(c.prediction.seconds for c in priced)
    assert priced[0].prediction is plan.predicted
    assert all(bool(c.reasons) != bool(c.prediction) or "needs" in c.reasons[0] for c in plan.candidates)
    assert {c.name for c in plan.candidates} == {
        "dense > eager (flash)", "dense > eager (math)", "lattice > eager (flash)", "lattice > eager (math)",
        "naive > reference (float64)", "dense > compiled (flex)", "dense > compiled (inductor)",
        "dense > compiled (inductor-kept)", "lattice > compiled (flex)", "lattice > compiled (inductor)",
        "lattice > compiled (inductor-kept)", "dense > compiled (sdpa)", "lattice > compiled (sdpa)",
    }  # fmt: skip
    assert repr(plan).startswith("<Plan longnet(segment_lengths=[8, 16], dilation_rates=[1, 2]) causal on cpu: ")


def spec_of(**options):
    return attrs.evolve(SMALL, **options)


@pytest.mark.parametrize("device", ["cpu", "h100"])
@pytest.mark.parametrize(
    "spec",
    [
        spec_of(),
        spec_of(pattern=P.full()),
        spec_of(pattern=P.window(3)),
        spec_of(pattern=P.longnet([8, 16], [1, 2], mix="mean")),
        spec_of(pattern=P.documents() & P.segments(8)),
        spec_of(softcap=3.0),
        open_spec(64),
        open_spec(64, pattern=P.window(3)),
    ],
    ids=lambda s: f"{s.pattern!r}{s.softcap or ''} {s.seq_len}",
)
def test_the_source_is_readable_python(spec, device):
    plan = attnplan.compile(attrs.evolve(spec, dtype="bfloat16"), device=device)
    functions = [f for f in ast.walk(ast.parse(plan.source)) if isinstance(f, ast.FunctionDef)]
    assert {f.name for f in functions} == {"forward"}
    assert all(f.args.args[0].arg == "self" for f in functions)
    assert max(len(line) for line in plan.source.splitlines()) < 400
    if device == "cpu":
        assert attnplan.compile(spec, backend="reference").source.startswith("# float64 interpreter over\n%0 = input(")


def test_explain_gives_the_same_facts_as_text_and_as_data():
    plan = attnplan.compile(SMALL)
    facts = plan.explain(format="json")
    assert json.loads(json.dumps(facts)) == facts
    text = plan.explain()
    for fact in (facts["choice"]["name"], facts["device"]["title"], facts["spec"]["shape"], *facts["mask"]):
        assert fact in text
    assert all(other["name"] in text for other in facts["others"])
    assert [p["name"] for p in facts["passes"]] == [s.name for s in plan.steps]
    with pytest.raises(SpecError, match='unknown format \'html\'; use "text" or "json"'):
        plan.explain("html")


@pytest.mark.parametrize(
    "spec",
    [
        spec_of(pattern=P.mask(lambda h, q, k: q > k)),
        spec_of(pattern=P.documents()),
        spec_of(pattern=~P.full()),
        open_spec(64),
        spec_of(seq_len=8, kv_len=32, q_offset=True),
        spec_of(batch=2, pattern=P.padding([3, 32])),
        spec_of(kv_len=3, seq_len=32),
        spec_of(seq_len=1),
    ],
    ids=lambda s: f"{type(s.pattern).__name__} {s.seq_len}",
)
def test_anything_can_be_explained(spec):
    plan = attnplan.compile(spec)
    assert plan.explain().startswith(repr(spec.pattern))
    json.dumps(plan.explain("json"))


@pytest.mark.parametrize("name", ["shard", "unshard", "positions", "shard_batch"])
def test_a_plan_without_a_mesh_shards_nothing(name):
    with pytest.raises(RingError, match="this plan has no mesh"):
        getattr(attnplan.compile(SMALL), name)(0)


@pytest.mark.parametrize("device", ["auto", "cpu", "h100"])
def test_planning_and_explaining_import_no_torch(device):
    code = f"""
import sys, attnplan
from attnplan import AttentionSpec, patterns as P
from attnplan.errors import AttnPlanError
spec = AttentionSpec(seq_len=4096, heads=4, head_dim=64, pattern=P.longnet([512, 1024], [1, 2]) & P.padding())
plan = attnplan.compile(spec, device={device!r}, max_memory="8 GiB")
plan.explain(), plan.explain("json"), str(plan.graph), plan.candidates, repr(plan)
try:
    attnplan.compile(spec, device={device!r}, max_memory=1)
except AttnPlanError:
    pass
sys.exit(7 * ("torch" in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
