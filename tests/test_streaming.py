"""Streams: tensors in memory and in files, interrupted, short, and on disks that fail."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import MemoryBudgetError, SpecError, StreamError
from attnplan.runtime import files, streaming
from attnplan.streams import choose
from bench.memory import measured
from bench.stream import expected_row, spec_of

LONG = AttentionSpec(
    seq_len=1000, heads=4, kv_heads=2, head_dim=16, dtype="float32", pattern=P.longnet([128, 512], [1, 4]), causal=True
)


def tensors(spec: AttentionSpec, batch: int = 1, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    sizes = [(h, spec.seq_len) for h in (spec.heads, spec.kv_heads, spec.kv_heads)]
    order = [(s, h) if spec.layout == "bshd" else (h, s) for h, s in sizes]
    return [torch.randn(batch, *o, spec.head_dim, dtype=getattr(torch, spec.dtype)) for o in order]


def goes_on(plan, paths, out, given, done):
    """Assert that a stream which ended early starts after the pieces that are done, and ends with what a call gives."""
    seen: list[int] = []
    plan.stream(*paths, out=str(out), max_memory="256 KiB", resume=True, progress=lambda n, _: seen.append(n))
    assert seen[0] == done
    torch.testing.assert_close(from_disk(out, plan(*given)), plan(*given))


def on_disk(folder: Path, given: list[torch.Tensor]) -> list[str]:
    paths = [str(folder / name) for name in "qkv"]
    for path, x in zip(paths, given, strict=True):
        Path(path).write_bytes(x.view(torch.uint8).numpy().tobytes())
    return paths


def from_disk(path: Path, like: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=like.dtype).reshape(like.shape)


def open_files() -> set[str]:
    return {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if _is_open(n)}


def _is_open(number: str) -> bool:
    try:
        os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return False
    return True


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_and_tensors_give_what_a_call_gives(layout, dtype, tmp_path):
    import attrs

    spec = attrs.evolve(LONG, layout=layout, dtype=dtype, batch=2)
    plan = attnplan.compile(spec, device="cpu")
    given = tensors(spec, batch=2)
    want = plan(*given)
    torch.testing.assert_close(plan.stream(*given, max_memory="256 KiB"), want)
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out"
    paths = on_disk(tmp_path, given)
    assert plan.stream(*paths, out=str(out), max_memory="512 KiB", progress=lambda *n: seen.append(n)) == str(out)
    torch.testing.assert_close(from_disk(out, want), want)
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 2
    assert not (tmp_path / "out.journal").exists()


def test_memory_maps_are_read_and_written(tmp_path):
    plan = attnplan.compile(LONG, device="cpu")
    given = tensors(LONG)
    paths = on_disk(tmp_path, given)
    maps = [np.memmap(p, dtype=np.float32, mode="r+", shape=tuple(x.shape)) for p, x in zip(paths, given, strict=True)]
    out = np.memmap(tmp_path / "out", dtype=np.float32, mode="w+", shape=(1, 4, 1000, 16))
    plan.stream(*maps, out=out, max_memory="256 KiB")
    torch.testing.assert_close(torch.from_numpy(np.asarray(out)), plan(*given))
    half = [torch.from_numpy(x.bfloat16().view(torch.int16).numpy()).numpy() for x in given]
    import attrs

    other = attnplan.compile(attrs.evolve(LONG, dtype="bfloat16"), device="cpu")
    torch.testing.assert_close(other.stream(*half), other(*(x.bfloat16() for x in given)))


def test_operands_follow_their_batch_element():
    spec = AttentionSpec(seq_len=300, heads=2, head_dim=16, dtype="float32", pattern=P.padding(), batch=2)
    plan = attnplan.compile(spec, device="cpu", strategy="dense")
    given = tensors(spec, batch=2)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, 100:] = False
    torch.testing.assert_close(
        plan.stream(*given, max_memory="600 KiB", key_padding=mask), plan(*given, key_padding=mask)
    )
    with pytest.raises(SpecError, match="needs key_padding with each stream"):
        plan.stream(*given)


def test_a_stream_drops_the_pairs_that_a_call_drops_and_joins_its_sinks():
    import attrs

    spec = attrs.evolve(LONG, seq_len=300, kv_len=300, dropout=0.3, sink_logits=True, alibi_slopes=True, batch=2)
    plan = attnplan.compile(spec, device="cpu")
    given, operands = tensors(spec, batch=2), {"sink_logits": torch.randn(4), "alibi_slopes": torch.rand(4)}
    want = plan(*given, dropout_seed=5, **operands)
    got = plan.stream(*given, max_memory="2 MiB", dropout_seed=5, **operands)
    torch.testing.assert_close(got, want)


def test_a_stream_goes_on_where_it_was_interrupted(tmp_path):
    plan = attnplan.compile(LONG, device="cpu")
    given = tensors(LONG)
    paths, out = on_disk(tmp_path, given), tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.stream(*paths, out=str(out), max_memory="256 KiB", progress=stop)
    assert json.loads((tmp_path / "out.journal").read_text())["done"] == 3
    seen: list[int] = []
    with pytest.raises(SpecError, match="is that of another stream"):
        plan.stream(*paths, out=str(out), max_memory="2 MiB", resume=True)
    plan.stream(*paths, out=str(out), max_memory="256 KiB", resume=True, progress=lambda done, _: seen.append(done))
    assert seen[0] == 3
    torch.testing.assert_close(from_disk(out, plan(*given)), plan(*given))
    (tmp_path / "out.journal").write_text("{")
    with pytest.raises(SpecError, match="cannot read the journal"):
        plan.stream(*paths, out=str(out), max_memory="256 KiB", resume=True)
    with pytest.raises(SpecError, match="resume=True needs a journal"):
        plan.stream(*given, max_memory="256 KiB", resume=True)


def test_a_short_file_is_refused_before_anything_runs(tmp_path):
    plan = attnplan.compile(LONG, device="cpu")
    given = tensors(LONG)
    paths = on_disk(tmp_path, given)
    size = os.path.getsize(paths[1])
    os.truncate(paths[1], size - 16 * 4 - 4)
    before = open_files()
    words = rf"k: the file .* has {size - 68} bytes, the spec needs {size}: it ends in batch element 0, head 1, row 998"
    with pytest.raises(SpecError, match=words):
        plan.stream(*paths, out=str(tmp_path / "out"))
    assert open_files() == before
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.journal").exists()
    mapped = np.memmap(paths[0], dtype=np.float32, mode="r", shape=(1, 4, 1000, 16))
    os.truncate(paths[0], 100)
    with pytest.raises(SpecError, match="has 100 bytes by now"):
        plan.stream(mapped, given[1], given[2])


@pytest.mark.parametrize("what", ["reading", "writing"])
def test_a_disk_that_fails_is_reported_and_nothing_leaks(what, tmp_path, monkeypatch):
    plan = attnplan.compile(LONG, device="cpu")
    given = tensors(LONG)
    paths, out = on_disk(tmp_path, given), tmp_path / "out"
    transfers, buffers = 0, list[weakref.ref[torch.Tensor]]()
    name = "preadv" if what == "reading" else "pwrite"
    real, read = getattr(os, name), files.Store.read

    def failing(*args):
        nonlocal transfers
        transfers += 1
        if transfers > 12:
            raise OSError(5, "Input/output error")
        return real(*args)

    def watched(self, where, into):
        buffers.append(weakref.ref(into))
        read(self, where, into)

    monkeypatch.setattr(os, name, failing)
    monkeypatch.setattr(files.Store, "read", watched)
    before = open_files()
    words = (
        rf"{what} (q|k|v|out) '.*' failed at byte \d+ \(batch element 0, heads \d to \d, rows \d+ to \d+\): .*Input/out"
    )
    try:
        plan.stream(*paths, out=str(out), max_memory="256 KiB")
    except StreamError as error:
        message, cause = str(error), error.__cause__
    import re

    assert re.search(words, message), message
    assert isinstance(cause, OSError)
    del cause
    assert open_files() == before
    gc.collect()
    assert buffers
    assert not [b for b in buffers if b() is not None]
    done = json.loads((tmp_path / "out.journal").read_text())["done"]
    monkeypatch.undo()
    goes_on(plan, paths, out, given, done)


@pytest.mark.parametrize("what", ["fsync", "journal"])
def test_a_disk_that_is_full_when_a_piece_is_kept_is_reported(what, tmp_path, monkeypatch):
    """The piece before stays the last that is done, nothing half written is left, and the stream can go on."""
    plan = attnplan.compile(LONG, device="cpu")
    given = tensors(LONG)
    paths, out = on_disk(tmp_path, given), tmp_path / "out"
    name, calls = ("fsync", 0) if what == "fsync" else ("replace", 0)
    real = getattr(os, name)

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(28, "No space left on device")
        return real(*args)

    before = open_files()
    monkeypatch.setattr(os, name, failing)
    words = "bringing out '.*' to the disk failed" if what == "fsync" else "cannot write the journal '.*' after piece 3"
    with pytest.raises(StreamError, match=rf"{words}: .*No space left") as caught:
        plan.stream(*paths, out=str(out), max_memory="256 KiB")
    assert isinstance(caught.value.__cause__, OSError)
    monkeypatch.undo()
    assert open_files() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k", "out", "out.journal", "q", "v"]
    done = json.loads((tmp_path / "out.journal").read_text())["done"]
    assert done == (3 if what == "fsync" else 2)
    goes_on(plan, paths, out, given, done)


@pytest.mark.parametrize("what", ["interrupt", "kernel"])
def test_nothing_leaks_when_a_stream_ends_early(what, tmp_path, monkeypatch):
    plan = attnplan.compile(LONG, device="cpu")
    given = tensors(LONG)
    paths, out = on_disk(tmp_path, given), tmp_path / "out"
    buffers, read, compute = list[weakref.ref[torch.Tensor]](), files.Store.read, streaming.Stream.compute
    error = KeyboardInterrupt if what == "interrupt" else RuntimeError

    def watched(self, where, into):
        buffers.append(weakref.ref(into))
        read(self, where, into)

    def failing(self, number, *tensors):
        if number == 2:
            raise error
        return compute(self, number, *tensors)

    before = open_files()
    monkeypatch.setattr(files.Store, "read", watched)
    monkeypatch.setattr(streaming.Stream, "compute", failing)
    try:
        plan.stream(*paths, out=str(out), max_memory="256 KiB")
    except error:
        ended = True
    assert ended
    assert open_files() == before
    gc.collect()
    assert buffers
    assert not [b for b in buffers if b() is not None]
    assert json.loads((tmp_path / "out.journal").read_text())["done"] == 2
    monkeypatch.undo()
    plan.stream(*paths, out=str(out), max_memory="256 KiB", resume=True)
    torch.testing.assert_close(from_disk(out, plan(*given)), plan(*given))


def test_a_process_that_is_killed_leaves_a_stream_that_goes_on(tmp_path):
    plan = attnplan.compile(LONG, device="cpu")
    given = tensors(LONG)
    paths, out = on_disk(tmp_path, given), tmp_path / "out"

    def die(done: int, total: int) -> None:
        if done == 2:
            os._exit(9)

    torch.set_num_threads(1)  # a child has no threads of its parent
    child = os.fork()
    if child == 0:
        try:
            plan.stream(*paths, out=str(out), max_memory="256 KiB", progress=die)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    seen: list[int] = []
    plan.stream(*paths, out=str(out), max_memory="256 KiB", resume=True, progress=lambda n, _: seen.append(n))
    assert seen[0] == 2
    torch.testing.assert_close(from_disk(out, plan(*given)), plan(*given))


def test_a_file_that_shrinks_while_it_is_read_is_reported(tmp_path):
    plan = attnplan.compile(LONG, device="cpu")
    paths = on_disk(tmp_path, tensors(LONG))

    def shrink(done: int, total: int) -> None:
        if done == 1:
            os.truncate(paths[0], 64)

    with pytest.raises(StreamError, match=r"reading q .* failed at byte .*the file ends here"):
        plan.stream(*paths, out=str(tmp_path / "out"), max_memory="256 KiB", progress=shrink)


def test_what_does_not_fit_the_spec_is_refused(tmp_path):
    plan = attnplan.compile(LONG, device="cpu")
    q, k, v = tensors(LONG)
    with pytest.raises(SpecError, match=r"k is \[1, 4, 1000, 16\] .* needs \[1, 2, 1000, 16\]"):
        plan.stream(q, q, v)
    with pytest.raises(SpecError, match="q must be a tensor, a numpy array or a path, got int"):
        plan.stream(3, k, v)
    with pytest.raises(StreamError, match=r"cannot open q .*: No such file"):
        plan.stream(str(tmp_path / "none"), k, v)
    with pytest.raises(SpecError, match="did you mean '8 GiB'"):
        plan.stream(q, k, v, max_memory="8 gigs")
    with pytest.raises(
        MemoryBudgetError, match=r"the smallest pieces .* need .*; the budget is 1 KiB; try max_memory='(\d+)"
    ):
        plan.stream(q, k, v, max_memory="1 KiB")
    biased = attnplan.compile(AttentionSpec(seq_len=64, heads=1, head_dim=8, dtype="float32", bias=True), device="cpu")
    with pytest.raises(SpecError, match="a bias is as large as the scores"):
        biased.stream(*tensors(biased.spec), bias=torch.zeros(1, 64, 64))


def test_the_smallest_budget_of_the_message_works_and_is_kept():
    plan = attnplan.compile(LONG, device="cpu")
    given = tensors(LONG)
    with pytest.raises(MemoryBudgetError) as caught:
        plan.stream(*given, max_memory=1)
    proposed = str(caught.value).rpartition("max_memory='")[2].rstrip("'")
    chosen = choose(plan, proposed, 1, list(range(4)))
    out = torch.empty_like(given[0])

    def run() -> tuple[torch.Tensor, ...]:
        plan.stream(*given, out=out, max_memory=proposed)
        return ()

    assert measured(run, "cpu").allocated <= chosen.total


def test_a_stream_whose_store_writes_elsewhere_is_caught(monkeypatch):
    """What the parity tests would see: pieces written one row late."""
    plan = attnplan.compile(LONG, device="cpu")
    given = tensors(LONG)
    queries = streaming.Work.queries.fget

    def late(self):
        batch, heads, rows = queries(self)
        return batch, heads, slice(max(0, rows.start - 1), rows.stop - (rows.start > 0))

    monkeypatch.setattr(streaming.Work, "queries", property(late))
    assert not torch.allclose(plan.stream(*given, max_memory="256 KiB"), plan(*given))


def test_the_oracle_of_the_bench_is_the_plan_s():
    spec = spec_of(12, "float32", 2)
    plan = attnplan.compile(spec, device="cpu")
    given = tensors(spec)
    out = plan(*given)
    for head, row in ((0, 5), (3, 4095), (7, 2048), (1, 2)):
        want = expected_row(spec, *given, head, row)
        torch.testing.assert_close(out[0, head, row].double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False])
def test_copies_overlap_and_the_result_is_that_of_a_call(pinned, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    import attrs

    pattern = P.longnet([1024, 4096], [1, 4])
    sizes = {"seq_len": 9000, "kv_len": 9000, "head_dim": 64, "value_dim": 64}
    spec = attrs.evolve(LONG, **sizes, dtype="bfloat16", pattern=pattern)
    plan = attnplan.compile(spec, device="cuda")
    given = tensors(spec)
    want = plan(*(x.cuda() for x in given)).cpu()
    given = [x.pin_memory() for x in given] if pinned else given
    torch.cuda.synchronize()
    gc.collect()  # modules are cycles: those of tests before count until they are found
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = plan.stream(*given, max_memory="16 MiB")
    assert torch.cuda.max_memory_allocated() - before <= 16 * 2**20
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    paths = on_disk(tmp_path, given)
    plan.stream(*paths, out=str(tmp_path / "out"), max_memory="16 MiB")
    torch.testing.assert_close(from_disk(tmp_path / "out", want), want, atol=2e-2, rtol=2e-2)
