"""Cross-validation: what it compares, what its reports say, and its command."""

from __future__ import annotations

import json
import math

import attrs
import pytest
import torch
from click.testing import CliRunner

from attnplan import patterns as P
from attnplan.cli import main
from attnplan.errors import KernelError, NoBackendError, SpecError
from attnplan.plan import Plan
from attnplan.testing import (
    Matrix,
    Report,
    Result,
    catalogue,
    cross_validate,
    cross_validate_catalogue,
    merge,
    numbers,
    validate,
)
from attnplan.verify import Check
from tests.faulty import (
    HERE,
    SPEC,
    Faulty,
    evolved,
    wrong_result,
)
from tests.test_registry import point

torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------- specs and reports


def test_a_kernel_that_fails_is_a_finding_and_no_other_takes_its_place(monkeypatch):
    program_at = Plan._program_at

    class Fails:
        differentiable_lse = True

        def __call__(self, *given):
            raise KernelError("this kernel never works")

    def failing(plan, *sizes):
        return Fails() if plan.schedule == "flash" else program_at(plan, *sizes)

    monkeypatch.setattr(Plan, "_program_at", failing)
    matrix = cross_validate(SPEC, device="cpu", backends="eager")
    found = {r.schedule: (r.status, r.reasons) for r in matrix.results if r.strategy == "dense"}
    assert found["flash"] == ("failed", ("this kernel never works",))
    assert found["math"][0] == "agrees"
    assert not matrix.agrees


def test_refusals_have_every_reason_and_a_backend_that_cannot_run_is_listed(provide, monkeypatch):
    provide(point("faulty", f"{HERE}:Faulty"), point("bad", "no_such_module:Backend"))
    monkeypatch.setattr(Faulty, "fault", wrong_result(lambda out, lse: (out, lse)))
    matrix = cross_validate(catalogue()["seven heads, one key head"], device="cpu")
    refused = {r.way: r.reasons for r in matrix.refused}
    assert refused["naive > faulty (wrong)"] == ("too deep", "too wide")
    assert refused["bad"][0].startswith("entry point of quick-attention failed: ModuleNotFoundError")
    text = str(matrix)
    assert "refused   naive > faulty (wrong)  too deep\n" in text
    assert "too wide\n" in text
    monkeypatch.setattr(Faulty, "schedules", lambda self, device: ())
    (none,) = cross_validate(SPEC, device="cpu", backends="faulty").results
    assert none.reasons[0].startswith("has no schedule for cpu")
    assert not cross_validate(SPEC, device="cpu", backends="faulty").agrees
    with pytest.raises(NoBackendError, match="nothing ran\n  faulty: has no schedule for cpu"):
        cross_validate(SPEC, device="cpu", backends="faulty").check()


def test_what_does_not_fit_the_device_is_refused(monkeypatch):
    small = attrs.evolve(validate.resolve("cpu"), device=attrs.evolve(validate.resolve("cpu").device, memory=1000))
    monkeypatch.setattr(validate, "resolve", lambda device: small)
    matrix = cross_validate(SPEC)
    assert matrix.ran == ()
    reasons = {r.way: r.reasons[0] for r in matrix.refused}
    assert "beside inputs and output, more than the device's 0.977 KiB" in reasons["naive > reference (float64)"]


@pytest.mark.parametrize(
    "name", ["documents of each element", "offset of each element", "longnet", "dropout", "padding"]
)
def test_a_large_spec_is_compared_on_a_sample_of_its_rows(name, monkeypatch):
    case = catalogue(dtype="float64")[name]
    shape = case.called.shape
    pairs = case.called.batch * shape.heads * shape.kv_len * len(case.called.branches)
    monkeypatch.setattr(numbers, "PAIRS_AT_ONCE", 5 * pairs)
    matrix = cross_validate(case, device="cpu").check()
    assert matrix.rows == f"5 of {shape.seq_len}"


def test_operands_of_a_plain_spec_are_drawn():
    spec = attrs.evolve(SPEC, pattern=P.documents() & P.padding(), dropout=0.1)
    assert len(cross_validate(spec, device="cpu").check().ran) > 1
    assert cross_validate(spec, device="cpu", seed=1).agrees


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "window(5)"}, "needs an AttentionSpec or a Case, got str"),
        ({"backends": ["eagr"]}, "unknown backend 'eagr'; did you mean 'eager'?"),
        ({"backends": ""}, "unknown backend ''"),
        ({"backends": []}, "no backend to cross-validate"),
        ({"repeat": 0}, "repeat must be a positive int, got 0"),
        ({"repeat": True}, "repeat must be a positive int, got True"),
        ({"device": "gpu9"}, "unknown device 'gpu9'"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(arguments, message):
    with pytest.raises(SpecError, match=message.replace("(", r"\(").replace("?", r"\?")):
        cross_validate(**{"spec": SPEC, "device": "cpu", **arguments})


def test_hardware_elsewhere_is_refused():
    with pytest.raises(NoBackendError, match="NVIDIA H100"):
        cross_validate(SPEC, device="h100")
    with pytest.raises(NoBackendError, match="NVIDIA H100"):
        cross_validate_catalogue("h100")


def test_nan_and_infinity_survive_json():
    checks = (Check("output", math.nan, 1e-6), Check("lse", math.inf, 1e-6))
    matrix = Matrix("x", "y", (Result("dense", "a", "b", "differs", checks, 0.5, ("why",)),))
    again = Matrix.from_dict(json.loads(json.dumps(matrix.to_dict(), allow_nan=False)))
    assert again.results[0].wrong
    assert again.results[0].worst == math.inf
    assert [c.passed for c in again.results[0].checks] == [False, False]
    assert str(again) == str(matrix)


def few(monkeypatch, *names):
    found = {name: catalogue()[name] for name in names}
    monkeypatch.setattr(validate, "catalogue", lambda size, dtype: found)


def test_a_report_of_the_catalogue(monkeypatch, tmp_path):
    few(monkeypatch, "causal", "softcap")
    report = cross_validate_catalogue("cpu").check()
    assert (report.size, report.dtype) == ("small", "float32")
    assert report.versions[0]["torch"] == torch.__version__
    report.write(str(tmp_path / "run.json"))
    assert Report.read(str(tmp_path / "run.json")) == report
    text = str(report)
    assert "refused   eager (flash): the flash operator has no softcap" in text
    assert "softcap (dense" in text
    assert text.splitlines()[-1].startswith("ok        2 cases, ")
    none = run_of(("a", "refused"))
    two = attrs.evolve(none, matrices=(*none.matrices, attrs.evolve(none.matrices[0], name="window")))
    assert "refused   a: a (every case)\n" in str(two)


def results(*pairs):
    return tuple(
        Result("dense", name, "", status, reasons=(name,) if status == "refused" else ()) for name, status in pairs
    )


def run_of(*pairs, **options):
    fields = {"device": "a GPU", "size": "large", "dtype": "bfloat16", "versions": ({"x": "1"},), **options}
    return Report(matrices=(Matrix("causal", "spec", results(*pairs)),), **fields)


def test_runs_are_merged_and_the_worst_stands():
    one = run_of(("a", "agrees"), ("b", "refused"), ("c", "refused"), ("d", "agrees"))
    two = run_of(("a", "agrees"), ("b", "agrees"), ("c", "refused"), ("d", "failed"), ("e", "agrees"))
    both = merge([one, two])
    found = {r.backend: r.status for r in both.matrices[0].results}
    assert found == {"a": "agrees", "b": "agrees", "c": "refused", "d": "failed", "e": "agrees"}
    assert both.versions == ({"x": "1"}, {"x": "1"})
    assert merge([two, one]).matrices[0].agrees is False


def test_a_backend_that_is_absent_in_one_run_is_what_it_was_in_the_other():
    absent = Matrix("causal", "spec", (Result("", "a", "", "refused", reasons=("import failed",)),))
    one, two = attrs.evolve(run_of(), matrices=(absent,)), run_of(("a", "agrees"))
    for runs in ([one, two], [two, one]):
        assert [(r.way, r.status) for r in merge(runs).matrices[0].results] == [("dense > a", "agrees")]
    assert merge([one, one]).matrices[0].refused[0].reasons == ("import failed",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "another"}, "the runs differ in device: a GPU and another"),
        ({"dtype": "float16"}, "the runs differ in dtype"),
        ({"size": "small"}, "the runs differ in size"),
    ],
)
def test_runs_that_do_not_belong_together_are_not_merged(options, message):
    with pytest.raises(SpecError, match=message):
        merge([run_of(("a", "agrees")), run_of(("a", "agrees"), **options)])
    other = attrs.evolve(run_of(("a", "agrees")), matrices=(Matrix("window", "spec", ()),))
    with pytest.raises(SpecError, match="the runs differ in their cases: causal, window"):
        merge([run_of(("a", "agrees")), other])
    with pytest.raises(SpecError, match="at least one report"):
        merge([])


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "a list"), ("{}", "KeyError"), ("nonsense", "not JSON"), (None, "No such file")]
)
def test_a_file_that_is_no_report_is_refused(text, message, tmp_path):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match=message):
        Report.read(str(path))
    with pytest.raises(SpecError, match="cannot write the report"):
        run_of().write(str(tmp_path / "no" / "folder.json"))


# ------------------------------------------------------------------------------------------------- the command line

FLAGS = ("--seq-len", "33", "--heads", "2", "--head-dim", "8", "--dtype", "float32", "--device", "cpu")


def command(code, *arguments):
    result = CliRunner().invoke(main, ["verify", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_command_prints_the_matrix():
    text = command(0, *FLAGS, "--softcap", "3", "--backends", "all").stdout
    assert "dense > eager (math)" in text
    assert "refused   dense > eager (flash)" in text
    facts = json.loads(command(0, *FLAGS, "--backends", "eager,reference", "--json").stdout)
    assert {r["status"] for r in facts["results"]} <= {"agrees", "refused"}
    assert {r["backend"] for r in facts["results"]} == {"eager", "reference"}


def test_the_command_exits_with_1_where_something_is_wrong_and_3_where_nothing_ran(faulty, monkeypatch):
    monkeypatch.setattr(Faulty, "fault", evolved(causal=False))
    wrong = command(1, *FLAGS, "--causal", "--backends", "all")
    assert "differs" in wrong.stdout, "the matrix is printed all the same"
    assert "VerifyError: causal" not in wrong.stdout
    assert "naive > faulty (wrong): output" in wrong.stderr
    none = command(3, "--seq-len", "9", "--heads", "7", "--head-dim", "8", "--backends", "faulty", "--device", "cpu")
    assert "refused   naive > faulty (wrong)  too deep" in none.stdout
    assert none.stderr.startswith("NoBackendError: ")


def test_the_command_runs_the_catalogue_and_merges_runs(monkeypatch, tmp_path):
    few(monkeypatch, "window", "documents")
    runs = [str(tmp_path / name) for name in ("one.json", "two.json")]
    for path, names in zip(runs, ("eager", "reference"), strict=True):
        text = command(0, "--catalogue", "--device", "cpu", "--backends", names, "--output", path).stdout
        assert "window" in text
    merged = command(0, "--merge", runs[0], "--merge", runs[1], "--output", str(tmp_path / "both.json"))
    assert "eager (flash)" in merged.stdout
    assert "reference (float64)" in merged.stdout
    both = Report.read(str(tmp_path / "both.json"))
    assert {r.backend for m in both.matrices for r in m.results} == {"eager", "reference"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*FLAGS, "--catalogue"), "a catalogue brings its specs; leave out"),
        (("spec.toml", "--catalogue"), "leave out spec.toml"),
        (("--catalogue", "--size", "huge", "--device", "cpu"), "unknown size 'huge'"),
        (("--catalogue", "--dtype", "int8", "--device", "cpu"), "unknown dtype 'int8'"),
        ((*FLAGS, "--size", "small"), "--size and --output belong to --catalogue or --merge"),
        ((*FLAGS, "--backends", "all", "--backend", "eager"), "pin one plan"),
        ((*FLAGS, "--backends", "nobody"), "unknown backend 'nobody'"),
        (("--merge", "no.json"), "cannot read the report 'no.json'"),
        (("--merge", "no.json", "--catalogue"), "--merge runs nothing"),
        (("--catalogue", "--output", "no/folder/x.json"), "there is no folder 'no/folder'"),
    ],
)
def test_bad_commands_are_refused_with_the_reason(arguments, message):
    result = command(2, *arguments)
    assert result.stdout == ""
    assert message in result.stderr
