"""Plans as files: what is written reads back equal, and whatever else a file says is an error in words."""

import json
import random
import re
import sys

import attrs
import pytest
import torch

import attnplan
from attnplan import AttentionSpec, Dim
from attnplan import patterns as P
from attnplan.api import fingerprint
from attnplan.errors import AttnPlanError, SpecError, VerifyError
from attnplan.ir.coverage import check_coverage, coverage, spec_coverage
from attnplan.store import _digest, dump, parse, read, record
from tests.running import Call, assert_agree

SPECS = {
    "longnet": AttentionSpec(
        seq_len=48, heads=4, head_dim=8, pattern=P.longnet([16, 32], [1, 2]), causal=True, dtype="float32"
    ),
    "longformer": AttentionSpec(
        seq_len=200, heads=4, kv_heads=2, head_dim=8, pattern=P.window(9) | P.global_tokens(4), dtype="float32"
    ),
    "open": AttentionSpec(seq_len=Dim("s", max=64), heads=2, head_dim=8, pattern=P.documents(), dtype="float32"),
    "layout": AttentionSpec(seq_len=64, heads=2, head_dim=8, pattern=P.blocks("10/11", 32), dtype="float32"),
}


def same(a, b):
    return (a.spec, a.graph, a.backend, a.schedule, a.strategy, a.device) == (
        b.spec, b.graph, b.backend, b.schedule, b.strategy, b.device)  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_a_plan_reads_back_equal(name, device, tmp_path):
    spec = attrs.evolve(SPECS[name], dtype="bfloat16") if device == "h100" else SPECS[name]
    plan = attnplan.compile(spec, device)
    plan.save(tmp_path / "plan.json")
    loaded = attnplan.load(tmp_path / "plan.json")
    assert same(loaded, plan)
    assert loaded.predicted.seconds == plan.predicted.seconds
    assert loaded.explain("json")["choice"] == plan.explain("json")["choice"]


def test_a_loaded_plan_runs_and_is_differentiated(tmp_path):
    plan = attnplan.compile(SPECS["longformer"], "cpu")
    plan.save(tmp_path / "plan.json")
    call = Call.of(SPECS["longformer"])
    assert_agree(call.got(attnplan.load(tmp_path / "plan.json")), call.expected(), 2e-6, "loaded")


def test_a_python_function_is_no_data(tmp_path):
    plan = attnplan.compile(
        AttentionSpec(seq_len=8, heads=1, head_dim=8, pattern=P.mask(lambda h, q, k: q >= k)), "cpu"
    )
    with pytest.raises(SpecError, match="holds a Python function and cannot be saved"):
        plan.save(tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()


def test_files_that_are_no_plans_are_refused_in_words(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(SpecError, match=r"cannot read the plan file .*No such file"):
        attnplan.load(path)
    with pytest.raises(SpecError, match=r"cannot read the plan file .*[Dd]irectory"):
        attnplan.load(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="is not UTF-8 text"):
        attnplan.load(path)
    for text, what in (
        ("", "is no plan file, or was cut off"),
        ("[1, 2]", "it has no key 'attnplan_plan'"),
        ("[" * 100_000, "is no plan file, or was cut off"),
        ('{"attnplan_plan": 7}', "has schema 7, this version reads 1"),
        ('{"attnplan_plan": 1}', "'spec' must be dict, got NoneType"),
    ):
        path.write_text(text)
        with pytest.raises(SpecError, match=what):
            attnplan.load(path)
    with pytest.raises(SpecError, match="cannot write the plan file"):
        attnplan.compile(SPECS["longnet"], "cpu").save(tmp_path / "missing" / "plan.json")


def test_a_stale_plan_is_refused_with_both_fingerprints_or_kept(tmp_path):
    plan = attnplan.compile(SPECS["longnet"], "cpu")
    path = tmp_path / "plan.json"
    path.write_text(dump(plan, "attnplan 0.0.1, torch 1.0"))
    with pytest.raises(SpecError, match=r"planned with attnplan 0\.0\.1, torch 1\.0; here are attnplan .*stale='keep'"):
        attnplan.load(path)
    assert same(attnplan.load(path, stale="keep"), plan)
    with pytest.raises(SpecError, match="unknown stale='keeep'; did you mean 'keep'"):
        attnplan.load(path, stale="keeep")


# ------------------------------------------------------------------------------------------------------ hostile files


FORBIDDEN = ("exec", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect",
             "ctypes.dlopen", "os.remove", "os.rename", "open")  # fmt: skip
happened: list | None = None


def _listen(event, arguments):
    if happened is not None and event in FORBIDDEN:
        happened.append((event, arguments))


sys.addaudithook(_listen)


def outcome(text):
    """Return the plan that a text describes, or None if it is refused in words; anything else fails the test.

    Meanwhile nothing may be executed, opened or started: the interpreter's own audit events say so.
    """
    global happened
    happened = []
    try:
        return parse(text, "the file", "here")
    except AttnPlanError:
        return None
    finally:
        seen, happened = happened, None
        assert seen == [], f"reading a file did {seen}"


@pytest.fixture(scope="module")
def warm():
    """Read good files once: what is imported or generated on first use is none of a file's doing."""
    for spec in SPECS.values():
        for device in ("cpu", "h100"):
            parse(dump(attnplan.compile(spec, device), "here", recorded=True), "the file", "here")


def test_the_audit_would_see_what_a_file_does(warm, monkeypatch):
    monkeypatch.setattr("attnplan.store._checked", lambda text, name: eval("1 + 1"))
    with pytest.raises(AssertionError, match="reading a file did"):
        outcome("{}")


def test_ten_thousand_mutations_are_errors_or_equal_plans(warm):
    plan = attnplan.compile(SPECS["longnet"], "cpu")
    text = dump(plan, "here", recorded=True)
    source = random.Random(0)
    alphabet = text + "\x00\u2028{}[]\"'\\,:%&|~()"
    read_back = 0
    for _ in range(10_000):
        kind, at = source.randrange(4), source.randrange(len(text))
        to = min(len(text), at + source.choice([1, 1, 1, 7, 400]))
        if kind == 0:
            mutated = text[:at]
        elif kind == 1:
            mutated = text[:at] + text[to:]
        elif kind == 2:
            mutated = text[:at] + source.choice(alphabet) + text[at + 1 :]
        else:
            mutated = text[:at] + text[at:to] * 2 + text[to:]
        found = outcome(mutated)
        if found is not None:
            read_back += 1
            assert (found.spec, found.found.lowered.graph) == (plan.spec, plan.graph)
    assert read_back < 1000, "only changes of white space may pass"


def scalars(value, path=()):
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from scalars(inner, (*path, key))
    else:
        yield path


HOSTILE = (
    None, True, -1, 0, 1e308, 10**30, "", "x", "__import__('os').system('true')", [], {}, "../../etc/passwd",
    "%0 = input() : f32[B]", "longnet([10**9], [1])", "window(1) | " * 50 + "full()", float("nan"),
)  # fmt: skip


def alter(data, source):
    """Change one thing that a file says: a value, a character of it, an element, or a whole key."""
    altered = json.loads(json.dumps(data))
    path = source.choice(list(scalars(altered)))
    target = altered
    for key in path[:-1]:
        target = target[key]
    last, old, kind = path[-1], target[path[-1]], source.random()
    if isinstance(old, str) and old and kind < 0.5:
        at = source.randrange(len(old))
        target[last] = old[:at] + source.choice("0123456789()[],=%&|~ abqkv") + old[at + 1 :]
    elif isinstance(target, list) and kind < 0.7:
        target.insert(source.randrange(len(target)), old) if kind < 0.6 else target.pop(last)
    elif isinstance(target, dict) and kind < 0.6:
        del target[last]
    else:
        target[last] = source.choice(HOSTILE)
    altered["digest"] = _digest(altered)
    return json.dumps(altered)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_files_altered_with_a_fitting_digest_are_proved_or_refused(count, warm):
    """Whoever alters a file can write its digest, too: behind it stand the types, the proof, and the backend."""
    source = random.Random(count)
    plans = [attnplan.compile(SPECS[name], device) for name in ("longnet", "longformer") for device in ("cpu", "h100")]
    files = [(plan, json.loads(dump(plan, "here", recorded=True))) for plan in plans]
    accepted = 0
    for _ in range(count):
        plan, data = source.choice(files)
        found = outcome(alter(data, source))
        if found is not None:  # what is accepted was proved to compute its spec
            accepted += 1
            assert found.spec.heads * found.spec.shape.seq_len * found.spec.head_dim < 10**7
            coverage_of = coverage(found.found.lowered.graph)
            check_coverage(spec_coverage(found.spec), coverage_of, "what was accepted")
            if found.spec == plan.spec:
                check_coverage(spec_coverage(plan.spec), coverage_of, "what was accepted")
    assert 0 < accepted < 0.8 * count  # a record says what it likes in its reasons


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seconds": "1"}, "'seconds' of 'record' must be float, got str"),
        ({"seconds": 0.0}, "must hold a positive time"),
        ({"seconds": float("inf")}, "must hold a positive time"),
        ({"peak_bytes": True}, "'peak_bytes' of 'record' must be int, got bool"),
        ({"peak_bytes": -1}, "must hold a positive time and a size"),
        ({"passes": [["lattice", 3]]}, "a pass of 'record' must be a name and two counts"),
        ({"passes": [["lattice", 3, True]]}, "a pass of 'record' must be a name and two counts"),
        ({"candidates": {"a": "fast"}}, "candidate 'a' of 'record' must have a time or reasons"),
        ({"candidates": {"a": -1.0}}, "candidate 'a' of 'record' must have a time or reasons"),
        ({"candidates": {"a": [1]}}, "candidate 'a' of 'record' must have a time or reasons"),
        ({"more": 1}, "'record' must hold choice, seconds"),
    ],
    ids=str,
)
def test_a_record_is_looked_at(change, says):
    data = json.loads(dump(attnplan.compile(SPECS["longnet"], "cpu"), "here", recorded=True))
    data["record"].update(change)
    data["digest"] = _digest(data)
    with pytest.raises(SpecError, match=re.escape(says)):
        parse(json.dumps(data), "plan.json", "here")


def test_a_record_reads_back_equal(tmp_path):
    plan = attnplan.compile(SPECS["longnet"], "h100")
    plan.save(tmp_path / "plan.json")
    loaded = attnplan.load(tmp_path / "plan.json")
    assert loaded.saved == record(plan, fingerprint())
    assert loaded.saved.candidates == {c.name: c.prediction.seconds if c.prediction and not c.reasons else c.reasons
                                       for c in plan.candidates}  # fmt: skip
    assert loaded.explain("json")["passes"] == [{**p, "seconds": None} for p in plan.explain("json")["passes"]]


@pytest.mark.parametrize("spec", ["longnet", "open longnet"])
def test_a_plan_in_pieces_reads_back_in_pieces(spec, tmp_path):
    """Calls of other lengths than the longest are cut anew, so the file has to say by what."""
    wide = attrs.evolve(SPECS["longnet"], head_dim=32, value_dim=32, batch=2, seq_len=512, kv_len=512)
    if spec == "open longnet":
        wide = attrs.evolve(wide, seq_len=Dim("s", max=512), kv_len=Dim("s", max=512))
    whole = attnplan.compile(wide, "cpu").predicted.peak_bytes
    plan = attnplan.compile(wide, "cpu", max_memory=whole // 3)
    assert "pieces of" in plan.choice
    plan.save(tmp_path / "plan.json")
    loaded = attnplan.load(tmp_path / "plan.json")
    assert loaded.choice == plan.choice
    length = 300 if spec == "open longnet" else 512
    assert loaded._program_at(length, length).source == plan._program_at(length, length).source
    q, k, v = (torch.randn(2, 4, length, 32) for _ in range(3))
    assert torch.equal(loaded(q, k, v), plan(q, k, v))


def test_a_graph_that_computes_something_else_is_refused():
    plan = attnplan.compile(SPECS["longnet"], "cpu")
    data = json.loads(dump(plan, "here"))
    place = next(i for i, line in enumerate(data["graph"]) if "where=causal()" in line)
    data["graph"][place] = data["graph"][place].replace("where=causal(), ", "")
    data["digest"] = _digest(data)
    with pytest.raises(VerifyError, match="the saved graph"):
        parse(json.dumps(data), "plan.json", "here")


def test_reading_a_file_is_bounded(tmp_path, monkeypatch):
    from attnplan import store

    monkeypatch.setattr(store, "MAX_BYTES", 10)
    (tmp_path / "big").write_text("x" * 11)
    with pytest.raises(SpecError, match="is larger than any plan"):
        read(tmp_path / "big")
