"""``attnplan draw``: files, options, refusals, and what all pictures keep to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import attrs
import pytest
from click.testing import CliRunner

import attnplan
from attnplan.cli import main
from attnplan.errors import AttnPlanError
from tests.drawn import LONGNET, SVG, ids, image, svg_of, words

pytest.importorskip("matplotlib")

from attnplan import pictures
from attnplan.pictures import style


@pytest.fixture(scope="module")
def plan():
    return attnplan.compile(LONGNET, "h100", backend="eager", strategy="lattice")


FLAGS = ("--seq-len", "512", "--heads", "2", "--head-dim", "64", "--pattern", "window(64)", "--causal")


def draw(*arguments):
    return CliRunner().invoke(main, ["draw", *map(str, arguments)])


@pytest.mark.parametrize("what", ["mask", "roofline", "length", "graph"])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_draw_writes_every_picture(what, kind, tmp_path):
    paths = [tmp_path / f"{i}.{kind}" for i in range(2)]
    for path in paths:
        device = () if what == "mask" else ("--device", "h100")
        result = draw(*FLAGS, *device, "--what", what, "-o", path)
        assert (result.exit_code, result.output) == (0, f"wrote {path}\n")
    assert paths[0].read_bytes() == paths[1].read_bytes()  # equal input, equal bytes
    if kind == "png":
        with image.open(paths[0]) as picture:
            assert min(picture.size) > 300
    else:
        assert ElementTree.parse(paths[0]).getroot().tag == f"{SVG}svg"


def drawn(path, what, *options):
    """Return what a picture shows, as data, after a look at the file that was written beside."""
    result = draw(*FLAGS, "--what", what, "-o", path, "--json", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found.pop("what"), found.pop("file"), found.pop("bytes")) == (what, str(path), path.stat().st_size)
    return found


def test_what_a_picture_shows_is_printed_as_json(tmp_path):
    path, h100 = tmp_path / "a.svg", ("--device", "h100")
    mask = drawn(path, "mask", "--tile", "64")
    [panel] = mask["panels"]
    assert (mask["tile"], mask["rows"], mask["columns"], panel["alike"]) == (64, 8, 8, [0, 1])
    [branch] = panel["branches"]
    assert (branch["full"], branch["partial"], branch["empty"]) == (0, 15, 49)
    assert "mask: 0 full, 15 partial, 49 empty" in path.read_text(encoding="utf-8")
    roofline = drawn(path, "roofline", *h100)
    assert {f"op-{p['id']}" for p in roofline["points"]} == set(re.findall(r'id="(op-\d+)"', path.read_text()))
    assert roofline["bytes_per_second"] == attnplan.cost.resolve("h100").device.bandwidth
    length = drawn(path, "length", *h100, "--lengths", "1k,2k")
    assert {n for c in length["curves"] for n in c["lengths"]} == {512, 1024, 2048}
    graph = drawn(path, "graph", *h100)
    assert graph["nodes"] == sum(map(len, graph["layers"])) == len(graph["graph"].strip().splitlines())


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        (("--zoom", 4), ((192, 320), (320, 192))),
        (("--rows", "100:200"), ((100, 200), (200, 100))),
        (("--rows", ":256", "--keys", "0:0.125k"), ((0, 128), (256, 0))),
    ],
)
def test_draw_zooms(options, limits, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: seen.append(figure))
    assert draw(*FLAGS, *options, "-o", tmp_path / "a.png").exit_code == 0
    [axes] = seen[0].axes
    assert (axes.get_xlim(), axes.get_ylim()) == limits


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("-o", "a.pdf"), 2, "written to a .png or .svg file, got 'a.pdf'"),
        (("-o", "a.png", "--what", "graph", "--tile", "8"), 2, "--tile belongs to --what mask, not to --what graph"),
        (("-o", "a.png", "--backend", "eager"), 2, "--backend belongs to --what roofline or graph"),
        (("-o", "a.png", "--device", "h100"), 2, "--device belongs to --what roofline or length or graph or ring"),
        (("-o", "a.png", "--mesh", "4"), 2, "--mesh belongs to --what ring, not to --what mask"),
        (("-o", "a.png", "--what", "ring"), 2, "--what ring needs --mesh, such as --mesh 8"),
        (("-o", "a.png", "--lengths", "1k"), 2, "--lengths belongs to --what length"),
        (("-o", "a.png", "--rows", "5"), 2, "--rows is a range such as 0:4k, got '5'"),
        (("-o", "a.png", "--zoom", "2", "--rows", "0:4"), 2, "give one of them"),
        (("-o", "a.png", "--head", "7"), 2, "head 7 does not exist"),
        (("-o", "/nowhere/a.png"), 2, "cannot write '/nowhere/a.png': No such file or directory"),
    ],
)
def test_draw_refuses_in_words(options, code, message):
    result = draw(*FLAGS, *options)
    assert result.exit_code == code
    assert message in result.output


@pytest.mark.parametrize("command", [("draw", "-o", "a.png"), ("report", "-o", "a.html")])
def test_without_matplotlib_the_command_that_installs_it_is_named(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(main, [*command, *FLAGS])
    assert result.exit_code == 2
    assert "pip install 'attnplan[plot]'" in result.output
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AttnPlanError, match="matplotlib"):
        pictures.mask_figure(LONGNET)


def test_drawing_loads_matplotlib_late_and_never_pyplot(tmp_path):
    code = f"""
import sys, attnplan.pictures, attnplan.report
assert "matplotlib" not in sys.modules
spec = attnplan.AttentionSpec(seq_len=8, heads=1, head_dim=8)
attnplan.pictures.save(attnplan.pictures.mask_figure(spec), {str(tmp_path / "a.svg")!r})
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_text_and_never_formulas_or_markup(plan):
    hostile = attrs.evolve(plan.device, title=r"$\frac{$ <b>&amp;</b> 机")
    made = attnplan.plan.Plan.__new__(type(plan))
    made.__dict__ = {**plan.__dict__, "device": hostile}
    assert any(hostile.title in w for w in words(svg_of(pictures.roofline_figure(made))))


@pytest.mark.parametrize("what", ["mask", "roofline", "length", "graph"])
def test_an_inline_picture_takes_the_colours_of_its_page(plan, what):
    figure = {
        "mask": lambda: pictures.mask_figure(LONGNET),
        "roofline": lambda: pictures.roofline_figure(plan),
        "length": lambda: pictures.length_figure(LONGNET, plan.target),
        "graph": lambda: pictures.graph_figure(plan.graph),
    }[what]()
    svg = svg_of(figure)
    assert "var(--ink)" in svg
    assert "var(--muted)" in svg
    for colour in (style.INK, style.MUTED, style.LINE, style.PAPER, "#ffffff", "#000000"):
        assert colour not in svg  # on a dark page neither white boxes nor black text
    named = [i for i in ids(svg) if i]
    assert all(i.startswith("x-") for i in named)
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    assert used <= set(named)
    assert used or what == "graph"
