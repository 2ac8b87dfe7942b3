"""diff, what-if, suggest and opt: from Python, and from the command line."""

import json

import attrs
import numpy as np
import pytest
from click.testing import CliRunner

import attnplan
from attnplan import AttentionSpec, compare, suggest
from attnplan import patterns as P
from attnplan.cli import main
from attnplan.errors import SpecError

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
    assert compare.parse_changes("seq_len=64k|1m, causal=false") == [
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
            compare.parse_changes(text)


def test_what_if_lists_plans_and_refusals():
    spec = AttentionSpec(seq_len=1024, heads=2, head_dim=64, pattern=P.window(64), causal=True, dtype="bfloat16")
    changes = compare.parse_changes("device=b200,seq_len=512|256,max_memory=1b|4gib")
    rows = compare.what_if(spec, {"device": "h100"}, changes)
    assert len(rows) == 5
    assert rows[0].plan.device.name == "h100"
    assert {r.plan.device.name for r in rows[1:] if r.plan} == {"b200"}
    assert [r.plan is None for r in rows[1:]] == [True, False, True, False]
    assert "MemoryBudgetError" in rows[1].error
    assert rows[2].plan.spec.kv_len == 512, "keys follow the queries where they were as many"
    assert "refused   MemoryBudgetError" in compare.render_rows(rows)


def test_what_if_on_the_command_line(spec_file):
    done = run("explain", spec_file, "--device", "h100", "--what-if", "device=a100", "--what-if", "max_memory=4gib")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["as it is", "device=a100", "max_memory=4 GiB"]
    facts = json.loads(run("explain", spec_file, "--device", "h100", "--what-if", "device=a100", "--json").output)
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


def test_suggest_on_the_command_line():
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
