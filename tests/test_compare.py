"""diff, what-if, suggest and opt: from Python, and from the command line."""

import json

import attrs
import numpy as np
import pytest
from click.testing import CliRunner

import attnplan
from attnplan import AttentionSpec, compare, suggest, what_if
from attnplan import patterns as P
from attnplan.api import fingerprint
from attnplan.cli import main
from attnplan.cost import calibration, resolve
from attnplan.cost.parameters import defaults
from attnplan.errors import SpecError
from attnplan.store import _digest, dump
from attnplan.units import format_seconds

LONGNET = AttentionSpec(
    seq_len=16_384, heads=8, head_dim=64, pattern=P.longnet([1024, 4096], [1, 4]), causal=True, dtype="bfloat16"
)


def run(*args, text=None):
    return CliRunner().invoke(main, [str(a) for a in args], input=text)


@pytest.fixture
def spec_file(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text(LONGNET.to_toml())
    return path


# ------------------------------------------------------------------------------------------------------------- diff


def test_a_diff_names_what_changed_and_why():
    a, b = (attnplan.compile(LONGNET, device, backend="eager") for device in ("h100", "a100"))
    found = compare.diff(a, b)
    assert found["device"] == ["h100", "a100"]
    assert found["seconds"] == [a.predicted.seconds, b.predicted.seconds]
    assert found["spec"] == {}
    assert any("attend" in name for name in found["ops"])
    text = compare.render(found)
    assert "h100 -> a100" in text
    assert json.dumps(found)


def test_a_plan_differs_in_nothing_from_itself():
    plan = attnplan.compile(LONGNET, "h100")
    found = compare.diff(plan, plan)
    assert (found["spec"], found["passes"], found["ops"]) == ({}, [], {})
    assert found["why"] == [f"the choice stays {plan.strategy} > {plan.backend} ({plan.schedule})"]


def test_a_refusal_on_one_side_is_the_reason():

    dense = attrs.evolve(LONGNET, pattern=P.full())
    a = attnplan.compile(dense, "h100")
    b = attnplan.compile(attrs.evolve(dense, softcap=30.0, dtype="float32"), "h100")
    assert (a.backend, a.schedule) != (b.backend, b.schedule)
    found = compare.diff(a, b)
    assert found["spec"] == {"dtype": [None, "float32"], "softcap": [None, 30.0]} or "dtype" in found["spec"]
    assert any("refuses" in why for why in found["why"])


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    """A calibration of this CPU that reaches half of what the published numbers say."""
    monkeypatch.setenv("ATTNPLAN_CACHE", str(tmp_path / "cache"))
    device = resolve("cpu").device
    numbers = {n: x / 2 for n, x in defaults("cpu").numbers().items() if n.startswith("kernels/flash-cpu/forward/peak")}
    assert numbers
    calibration.save(device, numbers, {})
    attnplan.cache_clear()
    yield
    attnplan.cache_clear()


SMALL = AttentionSpec(seq_len=2048, heads=2, head_dim=64, causal=True, dtype="float32")


def test_a_diff_between_two_bases_says_so_and_compares_on_one(calibrated):
    a, b = attnplan.compile(SMALL, "cpu"), attnplan.compile(SMALL, "a100")
    found = compare.diff(a, b)
    assert found["basis"] == ["calibrated", "data sheet"]
    sheet = found["data_sheet_seconds"]
    assert sheet[0] < 0.7 * a.predicted.seconds
    assert sheet[1] == b.predicted.seconds
    text = compare.render(found)
    line = next(x for x in text.splitlines() if x.startswith("predicted"))
    assert line.count("(calibrated) -> ") == 1
    assert line.endswith("(data sheet)"), "no factor between figures of two kinds"
    assert f"by the data sheet alone {format_seconds(sheet[0])} -> {format_seconds(sheet[1])}" in text
    same = compare.render(compare.diff(a, attnplan.compile(attrs.evolve(SMALL, batch=2), "cpu")))
    assert "(calibrated)" in same
    assert "by the data sheet alone" not in same


def test_a_diff_of_saved_plans_is_one_of_versions(tmp_path):
    plan = attnplan.compile(LONGNET, "h100")
    path = tmp_path / "old.json"
    plan.save(path)
    data = json.loads(path.read_text())
    data["fingerprint"] = "attnplan 0.0.9, torch 2.11.0"
    data["record"]["seconds"] *= 2
    data["record"]["candidates"]["dense > eager (cudnn)"] = ["was broken then"]
    data["record"]["passes"].append(["polish", 3, 2])
    data["digest"] = _digest(data)
    path.write_text(json.dumps(data))
    old = attnplan.load(path, stale="keep")
    found = compare.diff(old, plan)
    assert found["versions"] == ["attnplan 0.0.9, torch 2.11.0", fingerprint()]
    assert found["seconds"][0] == found["seconds"][1], "both are priced by this version"
    assert found["passes"][0][-1] == "polish 3 -> 2"
    assert found["candidates"]["dense > eager (cudnn)"][0] == ["was broken then"]
    assert any(w.startswith("A was predicted to take ") and "when it was saved" in w for w in found["why"])
    line = next(x for x in compare.render(found).splitlines() if x.startswith("versions"))
    assert "attnplan 0.0.9 -> 0.1.0" in line
    assert "torch 2.11.0 -> " in line
    assert compare.diff(plan, plan)["versions"] == []


def test_a_file_without_a_record_says_what_it_does_not_know(tmp_path):
    plan = attnplan.compile(LONGNET, "h100")
    (tmp_path / "a.json").write_text(dump(plan, fingerprint()))
    bare = attnplan.load(tmp_path / "a.json")
    other = attnplan.compile(LONGNET, "h100", strategy="dense", backend="eager")
    why = compare.diff(bare, other)["why"]
    assert f"{other.choice} is unknown to A, whose file holds no other candidates" in why


def test_a_way_that_exists_on_one_side_only_is_named():
    why = compare.diff(attnplan.compile(LONGNET, "h100"), attnplan.compile(LONGNET, "cpu"))["why"]
    assert any("does not exist for B" in w for w in why)
    loose = attnplan.compile(LONGNET, "h100")
    tight = attnplan.compile(LONGNET, "h100", max_memory=loose.predicted.peak_bytes // 32)
    assert "pieces of" in tight.choice
    found = compare.diff(loose, tight)
    assert found["choice"] == [loose.choice, tight.choice]
    assert any("is looped over otherwise or not at all" in w for w in found["why"])


def test_every_command_takes_a_saved_plan(spec_file, tmp_path):
    saved = tmp_path / "plan.json"
    small = attrs.evolve(SMALL, seq_len=64)
    attnplan.compile(small, "cpu").save(saved)
    page = run("explain", saved).output
    assert "\nsaved      predicted to take " in page
    assert "canonicalize" in page, "the passes that made it"
    assert json.loads(run("explain", saved, "--json").output)["saved"]["versions"] == fingerprint()
    assert "grad q     ok" in run("verify", saved, "--rows", 4).output
    assert "measured" in run("run", saved, "--repeat", 1).output
    for option in (("--device", "h100"), ("--heads", 3), ("--causal",), ("--max-memory", "1gib")):
        refused = run("explain", saved, *option)
        assert refused.exit_code == 2
        assert f"is a saved plan, for which {option[0]} has no effect" in refused.output
    for arguments in (("explain", saved, "--what-if", "batch=2"), ("backends", saved), ("draw", saved, "-o", "a.png")):
        refused = run(*arguments)
        assert refused.exit_code == 2
        assert "is a saved plan, and this needs a spec" in refused.output


def test_diff_on_the_command_line(spec_file, tmp_path):
    saved = tmp_path / "plan.json"
    assert run("explain", spec_file, "--device", "h100", "--save", saved).exit_code == 0
    both = run("diff", saved, spec_file, "--device-b", "a100")
    assert both.exit_code == 0, both.output
    assert "h100 -> a100" in both.output
    alone = run("diff", spec_file, "--device", "h100", "--device-b", "a100", "--json")
    assert json.loads(alone.output)["device"] == ["h100", "a100"]
    missing = run("diff", spec_file)
    assert missing.exit_code == 2
    assert "diff needs a second file, or --device-b" in missing.output


# ---------------------------------------------------------------------------------------------------------- what-if


def test_changes_are_read_with_alternatives():
    assert what_if.parse_changes("seq_len=64k|1m, causal=false") == [
        {"seq_len": 65_536, "causal": False},
        {"seq_len": 1_048_576, "causal": False},
    ]
    for text, what in (
        ("seqlen=4", r"--what-if knows no 'seqlen'; did you mean 'seq_len'"),
        ("seq_len", r"write name=value"),
        ("seq_len=4.5", r"cannot read '4.5' as a count"),
        ("max_memory=2 gigs", r"did you mean '2 GiB'"),
        ("causal=maybe", r"causal must be true or false"),
        ("scale=x", r"scale must be a number"),
    ):
        with pytest.raises(SpecError, match=what):
            what_if.parse_changes(text)


def test_what_if_lists_plans_and_refusals():
    spec = AttentionSpec(seq_len=1024, heads=2, head_dim=64, pattern=P.window(64), causal=True, dtype="bfloat16")
    changes = what_if.parse_changes("device=b200,seq_len=512|256,max_memory=1b|4gib")
    rows = what_if.what_if(spec, {"device": "h100"}, changes)
    assert len(rows) == 5
    assert rows[0].plan.device.name == "h100"
    assert {r.plan.device.name for r in rows[1:] if r.plan} == {"b200"}
    assert [r.plan is None for r in rows[1:]] == [True, False, True, False]
    assert "MemoryBudgetError" in rows[1].error
    assert rows[2].plan.spec.kv_len == 512, "keys follow the queries where they were as many"
    assert "refused   MemoryBudgetError" in what_if.render(rows)


def test_a_table_compares_on_one_basis(calibrated):
    rows = what_if.what_if(SMALL, {"device": "cpu"}, [{"device": "a100"}, {"batch": 2}])
    assert [r.plan.predicted.basis for r in rows] == ["calibrated", "data sheet", "calibrated"]
    lines = what_if.render(rows).splitlines()
    assert "by the data sheet" in lines[0]
    sheet = [compare.published_seconds(r.plan) for r in rows]
    assert f" x {sheet[1] / sheet[0]:.3g} " in lines[2]
    assert f" x {rows[2].plan.predicted.seconds / rows[0].plan.predicted.seconds:.3g} " in lines[3]
    assert lines[-1] == "factors compare the figures of the data sheet where two rows do not rest on the same"
    assert [r["data_sheet_seconds"] for r in what_if.facts(rows)["rows"]] == sheet
    one = what_if.render(what_if.what_if(SMALL, {"device": "cpu"}, [{"batch": 2}]))
    assert one.splitlines()[-1] == "predictions: calibrated"
    assert "by the data sheet" not in one


def test_a_row_says_what_it_is_looped_over(spec_file):
    rows = what_if.what_if(LONGNET, {"device": "h100"}, [{"max_memory": 2 * 2**20}])
    assert "pieces of" in rows[1].plan.choice
    assert rows[1].plan.choice in what_if.render(rows)


def test_what_if_on_the_command_line(spec_file):
    done = run("explain", spec_file, "--device", "b200", "--what-if", "device=a100", "--what-if", "max_memory=4gib")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line.split("  ")[0] for line in lines[1:-1]] == ["as it is", "device=a100", "max_memory=4 GiB"]
    assert lines[-1] == "predictions: data sheet"
    found = json.loads(run("explain", spec_file, "--device", "h100", "--what-if", "device=a100", "--json").output)
    assert found["schema"] == what_if.SCHEMA
    facts = found["rows"]
    assert facts[1]["changes"] == {"device": "a100"}
    assert facts[1]["seconds"] != facts[0]["seconds"]


# ---------------------------------------------------------------------------------------------------------- suggest


def test_suggestions_say_how_far_they_reach():
    found = suggest.suggest(16_384, heads=8, head_dim=64, device="h100", layers=4)
    reach = {str(s.pattern): s.reach for s in found}
    assert reach["full()"] == 16_383
    assert reach["window(512, 0)"] == 2048
    assert reach["window(8192, 0)"] == 16_383
    ladders = [s for s in found if "longnet" in str(s.pattern)]
    assert {s.reach for s in ladders} >= {8191, 16_383}
    times = [s.plan.predicted.seconds for s in found if s.plan]
    assert times == sorted(times)
    for s in found:
        assert s.pairs == s.plan.spec.count_pairs()


def test_reach_is_what_a_stack_of_layers_connects():
    """Breadth first over the real pairs of small masks: windows add up, segments are never left."""

    n, layers = 64, 3
    for pattern, want in ((P.window(5, 0), 15), (P.longnet([8, 16], [1, 2]), 15)):
        spec = AttentionSpec(seq_len=n, heads=2, head_dim=8, pattern=pattern, causal=True)
        i = np.arange(n)
        seen = np.zeros((n, n), dtype=bool)
        for branch in spec.branches:
            for h in range(2):
                seen |= np.broadcast_to(branch.pairs({}, np.array(h), i[:, None], i[None]), (n, n))
        reached = np.linalg.matrix_power(seen | np.eye(n, dtype=bool), layers)
        q, k = np.nonzero(reached)
        assert (q - k).max() == want


def test_suggestions_keep_to_the_budget():
    found = suggest.suggest(16_384, heads=8, head_dim=64, device="h100", max_memory="2 MiB")
    assert any(s.plan is None and "budget 2 MiB" in s.error for s in found)
    assert all(s.plan.predicted.peak_bytes <= 2 * 2**20 for s in found if s.plan)
    with pytest.raises(SpecError, match="leave pattern out"):
        suggest.suggest(64, 1, 8, pattern=P.full())
    with pytest.raises(SpecError, match="layers must be a positive int"):
        suggest.suggest(64, 1, 8, layers=0)


def test_a_refused_suggestion_says_that_pieces_may_fit():
    found = suggest.suggest(16_384, heads=8, head_dim=64, device="h100", max_memory="10 MiB")
    text = suggest.render(found)
    assert "refused   the smallest plan in one piece, " in text
    assert "try" not in text
    assert text.splitlines()[-2:] == [
        "predictions: calibrated elsewhere",
        "what is refused may run in pieces: `attnplan explain --max-memory` says at what price",
    ]
    assert "in pieces" not in suggest.render([s for s in found if s.plan])


def test_suggest_on_the_command_line():
    rows = json.loads(run("suggest", "--seq-len", "2k", "--heads", 2, "--head-dim", 64, "--json").output)
    assert rows["schema"] == suggest.SCHEMA
    assert {r["basis"] for r in rows["rows"]} == {"calibrated elsewhere"}
    done = run("suggest", "--seq-len", 16_384, "--heads", 8, "--head-dim", 64, "--device", "h100")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0].split() == ["pattern", "reach", "pairs", "predicted", "peak", "choice"]
    assert "suggest needs --heads" in run("suggest", "--seq-len", 64).output


# ------------------------------------------------------------------------------------------------------- opt and --ir


def test_a_printed_graph_is_rewritten_and_proved(spec_file, tmp_path):
    printed = run("explain", spec_file, "--device", "h100", "--ir", "split-heads").output
    done = run("opt", "-", "--passes", "lattice,fuse-merge", "--spec", spec_file, text=printed)
    assert done.exit_code == 0, done.output
    assert attnplan.ir.parse_graph(done.output).of(attnplan.ir.Take)
    wrong = tmp_path / "graph.txt"
    wrong.write_text(printed.replace("& causal()", "& window(9)"))
    found = run("opt", wrong, "--passes", "lattice", "--spec", spec_file)
    assert found.exit_code == 1, found.output
    assert "VerifyError" in found.output


def test_opt_says_what_ran_as_json(spec_file):
    printed = run("explain", spec_file, "--device", "h100", "--ir", "canonicalize").output
    text = run("opt", "--passes", "split-heads,lattice", text=printed).output
    found = json.loads(run("opt", "--passes", "split-heads,lattice", "--json", text=printed).output)
    assert found["graph"] == text
    assert [p["name"] for p in found["passes"]] == ["split-heads", "lattice"]
    assert found["passes"][0]["after"] == found["passes"][1]["before"]
    assert found["proved_against"] == "the graph read"
    against = json.loads(run("opt", "--passes", "lattice", "--spec", spec_file, "--json", text=printed).output)
    assert against["proved_against"] == str(spec_file)


def test_opt_refuses_what_is_no_graph_or_no_pass(spec_file):
    assert "unknown pass 'latice'; did you mean 'lattice'" in run("opt", "-", "--passes", "latice", text="").output
    assert "the text holds no node" in run("opt", "-", "--passes", "lattice", text="").output
    assert "cannot read the graph file" in run("opt", "no-such-file", "--passes", "lattice").output
    assert "no pass 'lattce' ran" in run("explain", spec_file, "--device", "h100", "--ir", "lattce").output
