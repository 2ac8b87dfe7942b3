"""The picture of a ring against the programs of its ranks: every message, byte by byte."""

from __future__ import annotations

import json
import re

import attrs
import pytest

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost import resolve
from attnplan.errors import RingError, SpecError
from attnplan.ring.build import programs
from attnplan.ring.program import traffic
from tests.drawn import ids, svg_of, words
from tests.test_draw import draw

pytest.importorskip("matplotlib")

from attnplan import pictures
from attnplan.pictures.ring import MAX_PANELS, ring_traffic

SPEC = AttentionSpec(
    seq_len=1024, heads=8, kv_heads=4, head_dim=16, value_dim=8, causal=True, dtype="bfloat16", batch=3
)
H200 = resolve("h200")
FEATURES = {"q": 16, "k": 16, "v": 8, "o": 8}
PLANS = {
    "ring": (P.full(), "zigzag", "ring"),
    "halo": (P.window(60, 0), "contiguous", "halo"),
    "rows": (P.longnet([64, 512], [1, 8]), "contiguous", "rows"),
    "all-gather": (P.full(), "contiguous", "all-gather"),
    "ulysses": (P.full(), "contiguous", "ulysses"),
    "local": (P.segments(256), "contiguous", "local"),
}


def found_for(name, ranks=4):
    pattern, layout, transport = PLANS[name]
    spec = attrs.evolve(SPEC, pattern=pattern)
    return spec, ring_traffic(spec, H200, ranks, layout, transport)


@pytest.mark.parametrize("name", PLANS)
def test_rows_and_columns_are_what_each_rank_receives_and_sends(name):
    spec, found = found_for(name)
    made = programs(spec, 4, found.candidate.layout, found.candidate.transport)
    for program in made:
        want = traffic(program, FEATURES, spec.dtype)
        got = sum(sum(step.sizes[program.rank]) for step in found.steps)
        sent = sum(row[program.rank] for step in found.steps for row in step.sizes)
        assert (got, sent) == (3 * want.received, 3 * want.sent)
        assert all(step.sizes[program.rank][program.rank] == 0 for step in found.steps)
    assert bool(found.steps) == (name != "local")
    assert found.received == tuple(3 * traffic(p, FEATURES, spec.dtype).received for p in made)


def test_a_window_needs_the_end_of_its_left_neighbour():
    _, found = found_for("halo")
    [step] = found.steps
    each = 60 * 4 * (16 + 8) * 2 * 3  # rows x heads of k and v x features x bytes x batch
    assert step.name == "hop 1: k, v by p2p"
    assert step.sizes == ((0, 0, 0, 0), (each, 0, 0, 0), (0, each, 0, 0), (0, 0, each, 0))


def test_heads_are_spread_before_and_after():
    _, found = found_for("ulysses")
    assert found.steps[0].name == "before: q by all-to-all"
    assert found.steps[-1].name == "after: o by all-to-all"


@pytest.mark.parametrize("name", PLANS)
def test_every_message_is_drawn_and_nothing_else(name):
    spec, found = found_for(name)
    svg = svg_of(pictures.ring_figure(spec, H200, 4, *PLANS[name][1:]))
    want = {
        f"x-step-{i}-from-{sender}-to-{receiver}"
        for i, step in enumerate(found.steps)
        for receiver, row in enumerate(step.sizes)
        for sender, size in enumerate(row)
        if size
    }
    assert {i for i in ids(svg) if "-from-" in i} == want
    said = " ".join(words(svg))
    assert f"{PLANS[name][1]} > {PLANS[name][2]} over 4 ranks" in said
    for step in found.steps:
        assert step.name in said
    assert ("every rank has the rows that it needs" in said) == (name == "local")


def test_many_steps_are_drawn_as_a_sum():
    spec = attrs.evolve(SPEC, pattern=P.full())
    found = ring_traffic(spec, H200, 16, "contiguous", "ring")
    assert len(found.steps) == 15
    svg = svg_of(pictures.ring_figure(spec, H200, 16, "contiguous", "ring"))
    last = MAX_PANELS - 1
    drawn = {i for i in ids(svg) if i.startswith(f"x-step-{last}-from-")}
    assert drawn == {f"x-step-{last}-from-{s}-to-{r}" for r in range(16) for s in range(r)}
    assert "7 steps are drawn in the sum only" in words(svg)


def test_impossible_rings_are_refused():
    with pytest.raises(SpecError, match=r"up to 64 ranks, not 72; `attnplan explain --mesh 9x8` lists hops"):
        pictures.ring_figure(SPEC, H200, 72)
    with pytest.raises(RingError, match="a mesh is a number of ranks"):
        pictures.ring_figure(SPEC, H200, "many")


def test_the_command_draws_a_ring(tmp_path):
    path, flags = tmp_path / "a.svg", ("--seq-len", 1024, "--heads", 8, "--head-dim", 16, "--what", "ring")
    given = (*flags, "--device", "h200", "--pattern", "window(60, 0)", "-o", path)
    done = draw(*given, "--mesh", "4", "--shards", "contiguous", "--transport", "halo", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    assert (facts["layout"], facts["transport"], facts["ranks"]) == ("contiguous", "halo", 4)
    assert facts["steps"][0]["bytes"][1] == [60 * 8 * 32 * 2, 0, 0, 0]
    assert len(re.findall(r'id="step-0-from-', path.read_text(encoding="utf-8"))) == 3
    assert "--what ring needs --mesh" in draw(*given).output
    spec = tmp_path / "spec.toml"
    spec.write_text('seq_len = 256\nheads = 4\nhead_dim = 16\npattern = "full()"\nring_size = 4\n', encoding="utf-8")
    own = draw(spec, "--device", "h200", "--what", "ring", "-o", path, "--json")
    assert json.loads(own.output)["ranks"] == 4
