"""Plans as objects: identity, bounded caches, and one plan for a thousand calls and many threads."""

from __future__ import annotations

import gc
import importlib
import itertools
import pkgutil
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec, api
from attnplan import patterns as P
from attnplan.plan import Plan
from tests.running import Call, error
from tests.small_plans import SMALL, open_spec, tensors

pytestmark = pytest.mark.usefixtures("fresh_caches")

TINY = AttentionSpec(seq_len=8, heads=1, head_dim=8, dtype="float32")


@pytest.fixture
def emissions(monkeypatch):
    """A list that grows by one with every program that any plan emits."""
    made, emit = [], Plan._emit
    monkeypatch.setattr(Plan, "_emit", lambda self, *args: made.append(args) or emit(self, *args))
    return made


# ------------------------------------------------------------------------------------------------------- identity


def test_equal_arguments_give_the_same_plan():
    plan = attnplan.compile(SMALL)
    again = AttentionSpec(
        seq_len=32, heads=2, head_dim=8, dtype=torch.float32, pattern="longnet([8, 16], [1, 2])", causal=True
    )
    assert again is not SMALL
    assert attnplan.compile(again) is plan
    assert attnplan.compile(SMALL, device="cpu") is attnplan.compile(SMALL, device=torch.device("cpu")) is plan
    assert attnplan.compile(SMALL, max_memory="1 MiB") is attnplan.compile(SMALL, max_memory=2**20)


OTHERS = {
    "not causal": {"spec": attrs.evolve(SMALL, causal=False)},
    "float64": {"spec": attrs.evolve(SMALL, dtype="float64")},
    "batch": {"spec": attrs.evolve(SMALL, batch=2)},
    "training": {"spec": attrs.evolve(SMALL, training=True)},
    "h100": {"device": "h100"},
    "eager": {"backend": "eager"},
    "reference": {"backend": "reference"},
    "dense": {"strategy": "dense"},
    "budget": {"max_memory": "1 GiB"},
    "deterministic": {"deterministic": True},
    "strict": {"strict": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_unequal_arguments_give_another_plan(name):
    assert attnplan.compile(**{"spec": SMALL, **OTHERS[name]}) is not attnplan.compile(SMALL)


def test_the_versions_of_libraries_are_part_of_the_identity(monkeypatch):
    plan = attnplan.compile(SMALL)
    monkeypatch.setattr(api, "_fingerprint", "torch 99")
    assert attnplan.compile(SMALL) is not plan


def test_clearing_the_cache_forgets_plans():
    plan = attnplan.compile(SMALL)
    attnplan.attention(*tensors())
    attnplan.cache_clear()
    assert (len(api._plans), len(api._calls)) == (0, 0)
    assert attnplan.compile(SMALL) is not plan


def test_the_least_recently_used_plan_is_forgotten_first():
    plans = api._Cache(2)
    plans.put("a", 1)
    plans.put("b", 2)
    plans.get("a")
    plans.put("c", 3)
    assert [plans.get(x) for x in "abc"] == [1, None, 3]
    assert plans.put("a", 9) == 1, "the first plan for a key stays, whoever comes second"


# --------------------------------------------------------------------------------------------------------- memory


def growth(work, count):
    """Return the bytes by which memory grows over ``count`` calls of ``work``, after as many to fill the caches."""
    numbers = itertools.count()
    for _ in range(count):
        work(next(numbers))
    gc.collect()
    tracemalloc.start()
    for _ in range(count):
        work(next(numbers))
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return grown


def test_ten_thousand_specs_do_not_fill_the_memory(monkeypatch):
    """The cheapest search that there is stands in for the real one: what is tested is what the caches keep."""
    found = api.search(SMALL, api.resolve("cpu"))
    monkeypatch.setattr(api, "search", lambda *args, **options: found)
    for n in range(10_000):
        attnplan.compile(attrs.evolve(SMALL, seq_len=32 + n, pattern=P.mask(lambda h, q, k, n=n: q + k > n)))
    assert len(api._plans) == api._KEPT_PLANS


KERNELS = (
    "attnplan.runtime.fused.triton_kernels",
    "attnplan.runtime.ring.merge_kernel",
    "attnplan.runtime.mask_functions",
)
"""Modules that need Triton or flash-attn 4, which a CPU machine need not have."""


def modules():
    found = {m.name for m in pkgutil.walk_packages(attnplan.__path__, "attnplan.")} - {*KERNELS}
    return [importlib.import_module(n) for n in sorted(found) if not n.endswith("__main__") and "transformers" not in n]


def caches():
    """Iterate over (module, name, function) of every function that remembers its results."""
    for module in modules():
        yield from ((module, name, f) for name, f in [*vars(module).items()] if hasattr(f, "cache_parameters"))


def test_plans_of_distinct_lambdas_are_let_go(monkeypatch):
    """With every cache made small, nothing but the caches may hold a plan or the function of its pattern."""
    monkeypatch.setattr(api, "_plans", api._Cache(4))
    small = {}
    for module, name, function in [*caches()]:
        size = min(4, function.cache_parameters()["maxsize"])
        monkeypatch.setattr(module, name, small.setdefault(function, lru_cache(size)(function.__wrapped__)))
    functions = []

    def plan(n):
        function = lambda h, q, k: (q + k) % 7 != n % 7  # noqa: E731
        functions.append(weakref.ref(function))
        attnplan.compile(attrs.evolve(TINY, pattern=P.mask(function)))

    assert growth(plan, 120) < 250_000  # what the caches hold; a plan that stays takes 5 KB or more
    assert sum(f() is not None for f in functions) <= 8


def test_every_cache_is_bounded():
    found = {f for _, _, f in caches()}
    assert len(found) > 20
    assert [f.__name__ for f in found if f.cache_parameters()["maxsize"] is None] == []


def test_calls_of_distinct_shapes_keep_a_bounded_number_of_plans(monkeypatch):
    monkeypatch.setattr(api, "_plans", api._Cache(4))
    monkeypatch.setattr(api, "_calls", api._Cache(8))
    for length in range(1, 25):
        x = torch.randn(1, 1, length, 4)
        attnplan.attention(x, x, x, pattern=P.window(3))
    assert (len(api._plans), len(api._calls)) == (4, 8)


def test_programs_of_open_lengths_are_bounded(monkeypatch, emissions):
    monkeypatch.setattr("attnplan.plan._KEPT_PROGRAMS", 3)
    plan = attnplan.compile(open_spec(64), strategy="lattice")
    for length in (8, 16, 24, 32, 40, 8):
        x = torch.randn(1, 2, length, 8)
        plan(x, x, x)
    assert len(plan._programs) == 3
    assert len(emissions) == 6


# -------------------------------------------------------------------------------------------------- one plan serves


def test_a_thousand_packed_batches_use_one_plan(emissions):
    spec = AttentionSpec(
        seq_len=24, heads=2, head_dim=8, dtype="float32", pattern=P.documents() & P.padding(), causal=True
    )
    plan = attnplan.compile(spec)
    source = torch.Generator().manual_seed(0)
    big = [torch.randn(8, 2, 24, 8, generator=source) for _ in range(3)]
    for n in range(1000):
        batch = 1 + n % 8
        cuts = torch.randint(0, 25, (batch, 2), generator=source).sort(dim=1).values
        documents = torch.cat([torch.zeros(batch, 1, dtype=torch.long), cuts, torch.full((batch, 1), 24)], dim=1)
        padding = torch.rand(batch, 24, generator=source) < 0.8
        out = plan(*(x[:batch] for x in big), documents=documents, key_padding=padding)
        assert attnplan.compile(spec) is plan
    assert len(emissions) == 1
    assert len(api._plans) == 1
    call = Call.of(spec, {"documents": documents, "key_padding": padding}, batch=batch)
    want = attrs.evolve(call, inputs=tuple(x[:batch] for x in big)).expected().out
    assert error(out, want) < 2e-6


def test_open_lengths_without_rows_taken_apart_use_one_program(emissions):
    plan = attnplan.compile(open_spec(64, pattern=P.window(5)))
    for length in range(1, 65):
        x = torch.randn(1, 2, length, 8)
        plan(x, x, x)
    assert len(emissions) == 1
    assert plan.program.follows_lengths


def test_planning_emits_nothing_until_it_has_to(emissions):
    plan = attnplan.compile(SMALL)
    plan.explain()
    assert emissions == []
    plan(*tensors())
    plan(*tensors())
    assert plan.source
    assert len(emissions) == 1


def test_many_threads_share_plans(monkeypatch):
    specs = [attrs.evolve(SMALL, seq_len=n, kv_len=n) for n in (16, 24, 32, 40)]
    calls = [(spec, Call.of(spec)) for spec in specs]
    for spec in (open_spec(48), open_spec(48, pattern=P.window(3))):
        calls += [(spec, Call.of(spec.at(n, n))) for n in (1, 8, 11, 16, 27, 48)]
    wanted = [call.expected().out for _, call in calls]
    start = threading.Barrier(8)

    def work(worker):
        start.wait()
        found = []
        for n in range(3 * len(calls)):
            place = (n + worker) % len(calls)
            spec, call = calls[place]
            plan = attnplan.compile(spec)
            assert error(plan(*call.inputs), wanted[place]) < 2e-6
            found.append((place, id(plan)))
        return found

    with ThreadPoolExecutor(8) as pool:
        ids = set().union(*pool.map(work, range(8)))
    assert len({plan for _, plan in ids}) == len(specs) + 2, "every thread got the same plan for a spec"
