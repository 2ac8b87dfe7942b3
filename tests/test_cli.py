"""The command line: files, flags and standard input in; pages, JSON and exit codes out."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cli import main
from attnplan.cost import catalogue
from attnplan.explain import SCHEMA
from attnplan.verify import Check
from tests.conftest import ROOT

FLAGS = ("--seq-len", "64", "--heads", "2", "--head-dim", "8", "--dtype", "float32")
LONGNET = (*FLAGS, "--pattern", "longnet([16, 32], [1, 2])", "--causal")
COMMANDS = sorted(main.commands)


def run(*arguments, stdin=None):
    """Run a command in this process; anything but a clean exit is an error of the test."""
    result = CliRunner().invoke(main, arguments, input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    return result


def ok(*arguments, **options):
    result = run(*arguments, **options)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refused(code, *arguments, **options):
    """Return what a command that fails says on standard error: one error, in words, and nothing on standard output."""
    result = run(*arguments, **options)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    return result.stderr


@pytest.fixture
def file(tmp_path):
    def write(text, name="spec.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


TOML = 'seq_len = 64\nheads = 2\nhead_dim = 8\ndtype = "float32"\npattern = "window(5)"\n'

# -------------------------------------------------------------------------------------------------------- explain


def unversioned(page):
    """Leave out the versions of packages, and times that vary."""
    return re.sub(r"torch \d[\w.+]*", "torch X.Y", page)


def test_an_explain_page_reads_as_reviewed(golden):
    page = ok(
        "explain", "--device", "h100", "--seq-len", "65536", "--heads", "12", "--head-dim", "64", "--causal",
        "--pattern", "longnet([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])",
    )  # fmt: skip
    golden("explain-longnet-h100", unversioned(page))


def test_the_graph_reads_as_reviewed(golden):
    page = ok(
        "explain", "--graph", "--device", "h100", "--seq-len", "100", "--heads", "4", "--kv-heads", "2", "--head-dim",
        "8", "--pattern", "longnet([16, 32], [1, 2])", "--causal", "--batch", "3", "--training",
    )  # fmt: skip
    golden("explain-graph-h100", unversioned(page))


def test_a_file_flags_and_standard_input_say_the_same(file):
    page = ok("explain", *FLAGS, "--pattern", "window(5)")
    assert ok("explain", file(TOML)) == page
    assert ok("explain", "-", stdin=TOML) == page
    assert ok("explain", file(AttentionSpec.from_text(TOML).to_json(), "spec.json")) == page


def test_flags_override_a_file(file):
    facts = json.loads(ok("explain", file(TOML), "--heads", "6", "--kv-heads", "3", "--causal", "--json"))
    assert (facts["spec"]["heads"], facts["spec"]["kv_heads"], facts["spec"]["causal"]) == (6, 3, True)
    causal = file(TOML + "causal = true\n", "causal.toml")
    assert "causal" in ok("explain", causal).splitlines()[0]
    assert "causal" not in ok("explain", causal, "--no-causal").splitlines()[0]


def test_every_flag_reaches_the_spec():
    given = (
        "--kv-len", "48", "--kv-heads", "1", "--value-dim", "4", "--batch", "3", "--layout", "bshd", "--scale", "0.5",
        "--softcap", "2.0", "--training",
    )  # fmt: skip
    spec = json.loads(ok("explain", *LONGNET, *given, "--json"))["spec"]
    assert AttentionSpec.from_dict({k: v for k, v in spec.items() if k not in ("title", "shape")}) == AttentionSpec(
        seq_len=64, heads=2, head_dim=8, dtype="float32", pattern=P.longnet([16, 32], [1, 2]), causal=True, kv_len=48,
        kv_heads=1, value_dim=4, batch=3, layout="bshd", scale=0.5, softcap=2.0, training=True,
    )  # fmt: skip


def test_pins_and_budgets_reach_the_plan():
    facts = json.loads(ok("explain", *LONGNET, "--strategy", "dense", "--backend", "eager", "--json"))
    assert (facts["choice"]["strategy"], facts["choice"]["backend"]) == ("dense", "eager")
    assert any("strategy='dense' was asked for" in o["refused"] for o in facts["others"])
    budget = json.loads(ok("explain", *LONGNET, "--max-memory", "40 KiB", "--json"))
    assert any("max_memory=40 KiB" in r for o in budget["others"] for r in o["refused"])


def test_the_json_page_holds_graph_and_source_where_asked_for():
    facts = json.loads(ok("explain", *LONGNET, "--json", "--graph", "--source"))
    assert facts["schema"] == SCHEMA
    assert facts["graph"].startswith("%0 = input(")
    assert "def forward" in facts["source"]
    assert not {"graph", "source"} & set(json.loads(ok("explain", *LONGNET, "--json")))


def test_the_graph_after_a_pass_is_json_where_asked_for():
    text = ok("explain", *LONGNET, "--ir", "lattice")
    assert json.loads(ok("explain", *LONGNET, "--ir", "lattice", "--json")) == {"pass": "lattice", "graph": text}


def test_the_source_is_printed_after_the_page():
    page, graph, source = ok("explain", *LONGNET, "--source", "--graph").partition("\n%0 = input(")
    assert page.startswith("longnet(")
    assert graph
    assert "def forward" in source


# --------------------------------------------------------------------------------------------------- run and verify


@pytest.mark.parametrize("extra", [(), ("--backward",), ("--layout", "bshd"), ("--backend", "reference")], ids=str)
def test_run_measures(extra):
    text = ok("run", *LONGNET, "--repeat", "2", *extra)
    assert re.search(r"(?m)^predicted +[\d.]+ [mu]?s \(calibrated elsewhere\)$", text)
    assert re.search(r"(?m)^measured +[\d.]+ [mu]?s, median of 2 \([\d.]+ [mu]?s to [\d.]+ [mu]?s\)$", text)


def test_run_gives_its_figures_as_json():
    facts = json.loads(ok("run", *LONGNET, "--repeat", "3", "--backward", "--json"))
    assert facts["repeat"] == 3
    assert facts["backward"] is True
    assert 0 < facts["fastest_seconds"] <= facts["measured_seconds"] <= facts["slowest_seconds"]
    assert facts["plan"].startswith("<Plan longnet(")


@pytest.mark.parametrize("pattern", ["documents() & padding()", "window(3) | sinks(2)", "segments(8)"])
def test_run_and_verify_bring_the_operands_that_a_spec_needs(pattern):
    ok("run", *FLAGS, "--pattern", pattern, "--repeat", "1")
    assert "grad v     ok" in ok("verify", *FLAGS, "--pattern", pattern, "--rows", "8")


def test_run_needs_no_gradient_where_none_is_asked_for():
    ok("run", *FLAGS, "--repeat", "1", "--no-training")


def test_verify_reports():
    text = ok("verify", *LONGNET, "--rows", "8", "--seed", "5")
    assert "coverage   proved: every pair of the spec exactly once" in text
    assert "numbers    8 sampled rows against float64" in text
    facts = json.loads(ok("verify", *LONGNET, "--rows", "8", "--seed", "5", "--json"))
    assert (facts["covered"], facts["rows"]) == (True, 8)
    assert [c["name"] for c in facts["checks"]] == ["output", "lse", "grad q", "grad k", "grad v"]
    assert all(c["error"] <= c["tolerance"] for c in facts["checks"])


def test_verify_exits_with_1_where_numbers_are_wrong(monkeypatch):
    monkeypatch.setattr("attnplan.verify._compare", lambda *args: (Check("output", 0.5, 1e-6),))
    assert refused(1, "verify", *LONGNET).startswith("VerifyError: <Plan longnet(")


# ------------------------------------------------------------------------------------------- devices and backends


def test_devices_are_listed_with_their_sources():
    text = ok("devices")
    for device in catalogue().values():
        assert device.name in text
        assert device.source in text
    assert "(here)" in text.splitlines()[1]
    rows = json.loads(ok("devices", "--json"))
    assert [r["name"] for r in rows if not r["here"]] == list(catalogue())
    assert all(r["source"] and r["tflops"]["float32"] > 0 and r["bandwidth_gb_s"] > 0 for r in rows)


def test_backends_are_listed():
    text = ok("backends")
    assert re.search(r"(?m)^eager +torch \d", text)
    assert re.search(r"(?m)^reference .*only when asked for by name$", text)
    rows = json.loads(ok("backends", "--device", "h100", "--json"))
    assert {r["name"]: set(r["schedules"]) for r in rows} == {
        "eager": {"cudnn", "flash", "efficient", "math"},
        "xformers": {"flash", "cutlass", "split-k"},
        "flash": {"fa4", "fa4-masks", "fa3", "fa2"},
        "compiled": {"flex", "flex-flash", "sdpa-cudnn", "sdpa-flash"},
        "reference": {"float64"},
    }
    assert re.search(r"(?m)^ +flash +SDPA's flash operator for CPU   run on CPU$", text)
    assert re.search(r"(?m)^ +fa3 +flash-attn 3   untested$", ok("backends", "--device", "h100"))
    assert "refused   has no schedule for cpu, a cpu device" in text


def test_backends_say_what_compiles_and_what_auto_leaves_to_those_who_ask():
    here, there = ok("backends"), ok("backends", "--device", "h100")
    assert re.search(r"(?m)^compiled +torch \S+   only when asked for by name$", here)
    assert re.search(r"(?m)^compiled +torch \S+$", there)
    flex = r"(?m)^ +flex +FlexAttention   run on H100, compiles once, about 6 s, 10 s to train$"
    assert re.search(flex, there)
    assert re.search(r"(?m)^ +flex-flash .*   untested, only when asked for by name$", there)
    assert re.search(r"(?m)^xformers +torch [^ ]+, mslk .* installed$", here), "it has nothing for a CPU to ask for"
    rows = {r["name"]: r for r in json.loads(ok("backends", "--device", "h100", "--json"))}
    assert {n: r["automatic"] for n, r in rows["compiled"]["schedules"].items() if r["automatic"]} == {"flex": True}
    assert rows["compiled"]["schedules"]["flex"]["compile_seconds"] == [6.0, 10.0]
    assert (rows["compiled"]["automatic"], rows["reference"]["automatic"]) == (True, False)
    long = ["--seq-len", "65536", "--heads", "16", "--head-dim", "128", "--dtype", "bfloat16"]
    asked = ["backends", "--device", "h100", *long, "--pattern", "random_blocks(0.1, block_size=128)"]
    assert re.search(r"(?m)^dense > compiled \(flex\) .* ms, compiles once, about 6 s$", ok(*asked))
    priced = {r["name"]: r["compile_seconds"] for r in json.loads(ok(*asked, "--json"))}
    assert (priced["dense > compiled (flex)"], priced["blocks > flash (fa4)"]) == (6.0, 0.0)
    assert priced["naive > reference (float64)"] is None


def test_backends_say_why_they_refuse_a_spec(file):
    spec = file(TOML + "softcap = 2.0\n")
    text = ok("backends", "--device", "v100", "--spec", spec)
    assert text == ok("backends", "--device", "v100", spec)
    assert text.endswith("\npredictions: data sheet\n")
    assert "refused   FlashAttention-2 has no softcap" in text
    assert "FlashAttention-2 needs compute capability 8.0, v100 has 7.0" in text
    assert re.search(r"(?m)^dense > eager \(math\) +[\d.]+ [mu]?s$", text)
    rows = {r["name"]: r for r in json.loads(ok("backends", "--device", "v100", spec, "--json"))}
    assert rows["dense > eager (math)"]["seconds"] > 0
    assert len(rows["dense > eager (flash)"]["refused"]) > 1
    assert ok("backends", *FLAGS).startswith("dense > eager (flash)")


# ---------------------------------------------------------------------------------------------------------- errors

BAD_FILES = {
    "unknown spec key 'head'; did you mean 'heads'": TOML.replace("heads", "head"),
    "unknown spec key 'seqlen'; did you mean 'seq_len'": TOML + "seqlen = 3",
    "is not valid TOML": "seq_len: 64",
    "the spec has no head_dim; it needs seq_len, heads and head_dim": "seq_len = 8\nheads = 2\n",
    "unknown dtype 'fp32'": TOML.replace("float32", "fp32"),
    "unknown pattern 'windw'; did you mean 'window'": TOML.replace("window", "windw"),
    "heads must be an int": TOML.replace("heads = 2", 'heads = "2"'),
    "causal must be True or False": TOML + 'causal = "yes"',
    "seq_len must be an int or a table": TOML.replace("seq_len = 64", "seq_len = { max = 3 }"),
    "kv_heads=3 does not divide heads=2": TOML + "kv_heads = 3",
    "pattern must be a pattern": TOML.replace('"window(5)"', "5"),
    "scale must be a positive finite number": TOML + "scale = nan",
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_a_bad_spec_exits_with_2_and_says_why(file, message):
    path = file(BAD_FILES[message])
    for command in ("explain", "run", "verify", "backends"):
        said = refused(2, command, path)
        assert said.startswith(f"SpecError: {path}")
        assert message in said
    said = refused(2, "explain", "-", stdin=BAD_FILES[message])
    assert said.startswith("SpecError: standard input")
    assert message in said


@pytest.mark.parametrize(
    ("name", "content"),
    [("spec.json", "[1, 2]"), ("spec.json", "{"), ("spec.json", "[" * 100_000), ("spec.toml", "a = " + "[" * 100_000)],
    ids=["list", "open", "deep json", "deep toml"],
)
def test_a_file_of_another_kind_exits_with_2(file, name, content):
    assert refused(2, "explain", file(content, name)).startswith("SpecError: ")


def test_a_file_that_cannot_be_read_exits_with_2(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"pattern = '\xe9'")
    assert "latin.toml': it is not UTF-8 text" in refused(2, "explain", str(tmp_path / "latin.toml"))
    assert "cannot read the spec file 'missing.toml': No such file" in refused(2, "explain", "missing.toml")
    assert "Is a directory" in refused(2, "explain", str(tmp_path))


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, ("explain",), "SpecError: the spec has no seq_len"),
        (2, ("explain", *FLAGS, "--device", "h10"), "unknown device 'h10'; did you mean 'h100'"),
        (2, ("explain", *FLAGS, "--backend", "eagr"), "unknown backend 'eagr'; did you mean 'eager'"),
        (2, ("explain", *FLAGS, "--strategy", "latice"), "unknown strategy 'latice'; did you mean 'lattice'"),
        (2, ("explain", *FLAGS, "--max-memory", "much"), "cannot read 'much' as a memory size"),
        (2, ("explain", *FLAGS, "--pattern", "window("), "SpecError: "),
        (2, ("explain", *FLAGS, "--pattern", "__import__('os')"), "SpecError: "),
        (2, ("explain", *FLAGS, "--batch", "0"), "batch must be at least 1, got 0"),
        (2, ("explain", *FLAGS, "--heads", "two"), "'two' is not a valid integer"),
        (2, ("run", *FLAGS, "--repeat", "0"), "0 is not in the range"),
        (2, ("verify", *FLAGS, "--rows", "0"), "0 is not in the range"),
        (2, ("explain", *FLAGS, "--colour"), "No such option"),
        (2, ("explian",), "No such command"),
        (2, ("backends", "--device", "h10"), "unknown device 'h10'"),
        (2, ("backends", "a.toml", "--spec", "b.toml"), "two specs were given, a.toml and b.toml"),
        (2, ("explain", *FLAGS, "--what-if", "batch=2", "--graph"), "leave --graph out"),
        (2, ("explain", *FLAGS, "--what-if", "batch=2", "--save", "x"), "leave --save out"),
        (2, ("explain", *FLAGS, "--ir", "lattice", "--measure"), "leave --measure out"),
        (2, ("explain", *FLAGS, "--shards", "zigzag"), "--shards and --transport belong to --mesh"),
        (2, ("explain", *FLAGS, "--mesh", "4", "--backend", "eager"), "leave --backend out"),
        (2, ("opt", "--passes", ","), "--passes names no pass; known: "),
        (2, ("draw", *FLAGS, "-o", "x.png", "--device", "h100"), "--device belongs to --what roofline or length or"),
        (3, ("run", *FLAGS, "--device", "h100"), "NoBackendError: this plan is for NVIDIA H100"),
        (3, ("verify", *FLAGS, "--device", "h100"), "NoBackendError: the coverage is proved, but NVIDIA H100"),
        (3, ("explain", *FLAGS, "--max-memory", "1 B"), "MemoryBudgetError: the smallest plan, "),
        (3, ("explain", *FLAGS, "--dtype", "bfloat16", "--device", "t4"), "t4 has no bfloat16"),
    ],
    ids=str,
)
def test_exit_codes(code, arguments, message):
    assert message in refused(code, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", *FLAGS, "--ir", "latice"), "no pass 'latice' ran for "),
        (("explain", *FLAGS, "--what-if", "seqlen=4"), "--what-if knows no 'seqlen'; did you mean 'seq_len'?"),
        (("explain", *FLAGS, "--what-if", "seq_len"), "write name=value"),
        (("explain", *FLAGS, "--what-if", "device=h10"), "unknown device 'h10'; did you mean 'h100'?"),
        (("explain", *FLAGS, "--what-if", ""), "cannot read ''"),
        (("explain", *FLAGS, "--seq-len", "1x"), "cannot read '1x' as a count"),
        (("diff", "PLAN"), "diff needs a second file, or --device-b"),
        (("diff", "PLAN", "TEXT"), "text.md is not valid TOML"),
        (("diff", "PLAN", "CUT"), "cut.json is not valid JSON"),
        (("diff", "PLAN", "ALTERED"), "was altered after it was saved: its digest does not fit"),
        (("diff", "PLAN", "MISSING"), "cannot read the spec file"),
        (("diff", "PLAN", "FOLDER"), "Is a directory"),
        (("explain", "ALTERED"), "was altered after it was saved"),
        (
            ("explain", *FLAGS, "--save", "/nowhere/plan.json"),
            "cannot write the plan file '/nowhere/plan.json': No such",
        ),
        (("explain", *FLAGS, "--save", "FOLDER"), "Is a directory"),
        (("draw", *FLAGS, "-o", "/nowhere/mask.png"), "cannot write '/nowhere/mask.png': No such file"),
        (("draw", *FLAGS, "-o", "mask.gif"), "a picture is written to a .png or .svg file, got 'mask.gif'"),
        (("report", *FLAGS, "-o", "/nowhere/plan.html"), "cannot write '/nowhere/plan.html': No such file"),
        (("opt", "TEXT", "--passes", "lattice"), "PassError: "),
        (("opt", "MISSING", "--passes", "lattice"), "cannot read the graph file"),
        (("suggest", "--seq-len", "64k", "--heads", "4", "--head-dim", "64", "--layers", "0"), "layers must be"),
        (("backends", "--backend", "eagr"), "unknown backend 'eagr'; did you mean 'eager'?"),
    ],
    ids=str,
)
def test_wrong_input_is_refused_in_words(arguments, message, tmp_path):
    plan = tmp_path / "plan.json"
    ok("explain", *FLAGS, "--save", str(plan))
    text = plan.read_text(encoding="utf-8")
    (tmp_path / "cut.json").write_text(text[:300], encoding="utf-8")
    (tmp_path / "altered.json").write_text(text.replace('"seq_len": 64', '"seq_len": 65'), encoding="utf-8")
    (tmp_path / "text.md").write_text("# A heading\n\n**No plan.**\n", encoding="utf-8")
    files = {"PLAN": "plan.json", "CUT": "cut.json", "ALTERED": "altered.json", "TEXT": "text.md",
             "MISSING": "missing.json", "FOLDER": "."}  # fmt: skip
    if "device=h10" in arguments:  # a table goes on: the row says it
        assert message in ok(*arguments)
        return
    assert message in refused(2, *(str(tmp_path / files[a]) if a in files else a for a in arguments))


def test_lengths_are_read_as_people_write_them():
    facts = json.loads(ok("explain", *FLAGS, "--seq-len", "2k", "--kv-len", "4k", "--json"))
    assert (facts["spec"]["seq_len"], facts["spec"]["kv_len"]) == (2048, 4096)


def test_one_backend_may_be_asked_alone():
    alone = ok("backends", *LONGNET, "--device", "h100", "--backend", "xformers").splitlines()
    assert all("> xformers (" in x or x.startswith("     ") for x in alone[:-1])
    every = ok("backends", *LONGNET, "--device", "h100").splitlines()
    assert len([x for x in every if "> xformers (" in x]) == len([x for x in alone if "> xformers (" in x]) > 3
    assert json.loads(ok("backends", "--backend", "flash", "--json"))[0]["name"] == "flash"
    assert ok("backends", *FLAGS, "--device", "cpu", "--backend", "flash").startswith(
        "flash  refused   has no schedule"
    )


def test_a_ring_exits_with_3_where_it_is_none_or_has_no_such_figures(file, tmp_path):
    ring = file(TOML + "ring_size = 4")
    assert "RingError: a mesh is a number of ranks" in refused(3, "explain", ring, "--mesh", "many")
    roofline = ("draw", ring, "--what", "roofline", "-o", str(tmp_path / "a.png"))
    for command in (("diff", ring, ring), roofline):
        assert "is for plans on one device, this one has 4 ranks" in refused(3, *command)
    assert "--what-if is for plans on one device" in refused(3, "explain", ring, "--what-if", "batch=2")
    rows = json.loads(ok("explain", file(TOML), "--what-if", "ring_size=4", "--json"))["rows"]
    assert "--what-if is for plans on one device" in rows[1]["error"]


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS)], ids=str)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(command, flag):
    text = ok(*command, flag)
    assert text.startswith("Usage: ")
    assert all(c in text for c in (COMMANDS if not command else ("--json",)))
    assert max(map(len, text.splitlines())) <= 100


# ---------------------------------------------------------------------------------------------------- processes


def process(*arguments, stdin=None):
    return subprocess.run(
        [sys.executable, "-m", "attnplan", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_a_pipe_gets_plain_text_and_nothing_on_standard_error():
    done = process("explain", "-", stdin=TOML)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert done.stdout == ok("explain", "-", stdin=TOML)


def test_a_process_exits_with_the_code_and_one_line():
    done = process("explain", "no-such-file.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "SpecError: cannot read the spec file 'no-such-file.toml': No such file or directory\n"
    assert process("run", *FLAGS, "--device", "h100").returncode == 3


def test_a_process_verifies():
    done = process("verify", *LONGNET, "--rows", "4", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["covered"] is True


def test_a_terminal_gets_colour(monkeypatch):
    """The same words as in a pipe, with escape codes between them."""
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["explain", *LONGNET], standalone_mode=False)
    assert "\x1b[" in terminal.getvalue()
    monkeypatch.undo()
    assert re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()) == ok("explain", *LONGNET)


@pytest.mark.skipif(sys.platform == "win32", reason="needs head")
def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m attnplan devices | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.startswith("name ")
    assert "Traceback" not in done.stderr
