"""The HTML report: what it says, that nothing in it can act, and how a real browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import attrs
import pytest
from click.testing import CliRunner

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cli import main
from attnplan.plan import Plan
from tests.drawn import LONGNET, MILLION, image

pytest.importorskip("matplotlib")

from attnplan.report import report, sections
from attnplan.report.html import Html, bar, page, table, tag

VOID = {"meta", "link", "br", "img", "hr"}
MARKUP = '<script>alert(1)</script><img src=x onerror="alert(2)">\'"&amp;'


class Page(HTMLParser):
    """Reads a page, and fails where elements are not nested."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, k, v or "") for k, v in attributes]
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, k, v or "") for k, v in attributes]

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def plan():
    return attnplan.compile(LONGNET, "h100")


@pytest.fixture(scope="module")
def written(plan):
    return report(plan)


@pytest.fixture(scope="module")
def million():
    return report(attnplan.compile(MILLION, "h100"))


def harmless(text):
    """Return a page that was read, after looking for anything that acts or that comes from elsewhere."""
    read = Page(text)
    assert not {"script", "iframe", "object", "embed", "form", "base", "foreignobject"} & set(read.tags)
    assert not [a for a in read.attributes if a[1].startswith("on")]
    for name, key, value in read.attributes:
        if key in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")) or (name, value) == ("link", "data:,")
        if key == "http-equiv":
            assert value == "Content-Security-Policy"
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in read.attributes
    assert not re.search(r"url\((?!#)|@import", text)
    return read


# --------------------------------------------------------------------------------------------------------- content


def test_a_report_holds_everything(plan, written):
    text = harmless(written).text
    for candidate in plan.candidates:
        assert candidate.name in text
        for reason in candidate.reasons:
            assert " ".join(reason.split()) in text
    facts = plan.explain(format="json")
    for op in facts["ops"]:
        if op["seconds"]:
            assert f"%{op['id']} {op['op']}" in text
            assert op["what"] in text
            assert op["result"] in text
    for step in plan.steps:
        assert f"Graph after {step.name}, {len(step.graph)} ops" in text
        assert " ".join(str(step.graph).split()) in text
    assert " ".join(plan.source.split()) in text
    assert " ".join(LONGNET.to_toml().split()) in text
    assert facts["choice"]["basis"] in text
    assert facts["device"]["source"] in text
    for other in ("device=a100", "device=b200", "max_memory=", "training=True"):
        assert other in text


def test_a_report_shows_four_pictures_and_every_id_once(written):
    read = Page(written)
    assert read.tags.count("svg") == 4
    found = [v for _, k, v in read.attributes if k == "id"]
    assert len(found) == len(set(found)) > 100
    assert all(any(v.startswith(f"{name}-") for v in found) for name in ("mask", "roofline", "length", "graph"))


def test_bars_are_as_long_as_the_shares(plan, written):
    times = [op.seconds for op in plan.predicted.ops if op.seconds > 0]
    shares = [seconds / sum(times) for seconds in times]
    widths = [float(w) / 100 for w in re.findall(r'<i style="width: ([\d.]+)%">', written)]
    assert widths == pytest.approx(shares, abs=6e-4)
    assert sum(widths) == pytest.approx(1, abs=0.01)


def test_only_the_choice_is_set_off(plan, written):
    rows = re.findall(r'<tr class="chosen">(.*?)</tr>', written)
    assert len(rows) == 1
    assert html.escape(plan.choice) in rows[0]


def test_a_million_tokens_make_less_than_two_megabytes(million):
    assert 100_000 < len(million.encode()) < 2 * 2**20
    harmless(million)


def test_a_page_is_made_for_phones_and_for_the_dark(written):
    read = Page(written)
    assert ("meta", "content", "width=device-width, initial-scale=1") in read.attributes
    assert "prefers-color-scheme: dark" in written
    assert read.tags.count("table") == written.count('<div class="wide" tabindex="0"><table>')


# --------------------------------------------------------------------------------------------------- hostile texts


def test_a_device_cannot_write_html(plan):
    device = attrs.evolve(plan.device, title=MARKUP, source=MARKUP)
    made = Plan.__new__(Plan)
    made.__dict__ = {**plan.__dict__, "device": device, "target": attrs.evolve(plan.target, device=device, note=MARKUP)}
    read = harmless(report(made))
    assert read.text.count("<script>alert(1)</script>") >= 3  # as text: in the head of the page, and in pictures


def test_a_function_cannot_write_html():
    def ask(h, q, k):
        return (q + k) % 3 > 0

    ask.__name__ = ask.__qualname__ = MARKUP
    spec = AttentionSpec(seq_len=64, heads=2, head_dim=8, pattern=P.mask(ask), dtype="float32")
    read = harmless(report(attnplan.compile(spec, "cpu")))
    assert "holds a Python function and cannot be saved" in read.text


def test_reasons_and_errors_are_escaped(plan):
    refused = tuple(attrs.evolve(c, reasons=(MARKUP,)) if c.reasons else c for c in plan.candidates)
    made = Plan.__new__(Plan)
    made.__dict__ = {**plan.__dict__, "candidates": refused}
    assert MARKUP in "".join(harmless(report(made)).texts)


def test_html_helpers_escape():
    assert tag("p", MARKUP, title=MARKUP).count("<") == 2
    assert Page(tag("p", title=MARKUP)).attributes == [("p", "title", MARKUP)]
    assert tag("p", Html("<b>a</b>")) == "<p><b>a</b></p>"
    assert "<script" not in table((MARKUP,), [(MARKUP,)], "-")
    assert "<script" not in page(MARKUP, MARKUP)
    assert [bar(x).count("width: 100.0%") for x in (1.0, 3.0)] == [1, 1]


# --------------------------------------------------------------------------------------------- what may be missing


def test_without_torch_there_is_no_program_and_the_page_says_so(plan, monkeypatch):
    monkeypatch.setattr(sections, "find_spec", lambda name: None)
    text = harmless(report(plan)).text
    assert "torch is not installed here" in text
    assert "Emitted source" not in text


def test_a_long_listing_is_cut_and_the_page_says_so(plan, monkeypatch):
    monkeypatch.setattr(sections, "LONGEST_TEXT", 100)
    left = len(str(plan.steps[-1].graph)) - 100
    assert f"... and {left:,} more characters" in harmless(report(plan)).text


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (AttentionSpec(seq_len=64, heads=2, head_dim=8, pattern=P.documents([30, 34])), "no picture: no other length"),
        (
            AttentionSpec(seq_len=64, heads=2, head_dim=8, pattern=P.documents(), causal=True),
            "pairs depend on the operands of each call",
        ),
        (AttentionSpec(seq_len=1, kv_len=300, heads=4, kv_heads=2, head_dim=8, batch=3, training=True), "batch=1"),
        (AttentionSpec(seq_len=attnplan.Dim("s", max=512), heads=2, head_dim=64, causal=True), "S=s<=512"),
    ],
    ids=repr,
)
def test_other_specs_have_a_report_too(spec, says):
    assert says in harmless(report(attnplan.compile(spec, "h100"))).text


def test_a_ring_has_a_report_with_who_sends_what():
    plan = attnplan.compile(attrs.evolve(LONGNET, ring_size=4), "h200")
    page = report(plan)
    read = harmless(page)
    facts = plan.explain("json")
    assert f"4 x {plan.device.title} (not here), a virtual ring on one device" in read.text
    assert "no picture" not in read.text
    assert read.tags.count("svg") == 2
    found = [v for _, k, v in read.attributes if k == "id"]
    assert len(found) == len(set(found))
    assert any(v.startswith("ring-") for v in found)
    for candidate in (facts["choice"], *facts["others"]):
        assert candidate["name"] in read.text
        assert " ".join((candidate["refused"] or "").split()) in read.text
    for refused in facts["refused"]:
        assert all(reason in read.text for reason in refused["reasons"])
    body = page.partition("hop by hop")[2].partition("</table>")[0]
    assert body.count("<tr>") == 1 + len(facts["hops"])
    table = page.partition("<h2>Candidates</h2>")[2].partition("</table>")[0]
    accepted = [c["name"] for c in (facts["choice"], *facts["others"]) if not c["refused"]]
    assert re.findall(r'<tr(?: class="chosen")?><td class="w">(.*?)</td>', table) == [html.escape(n) for n in accepted]
    assert table.count('class="chosen"') == 1
    assert " ".join(plan.spec.to_toml().split()) in read.text


def test_a_what_if_row_says_its_choice_and_basis(plan, written):
    rows = re.findall(r"<tr>(.*?)</tr>", written.partition("<h2>What if</h2>")[2].partition("</table>")[0])
    assert len(rows) >= 4
    assert ">basis<" in rows[0]
    assert all("data sheet" in row or "calibrated elsewhere" in row or "Error" in row for row in rows[1:])
    assert html.escape(plan.choice) in rows[1]
    assert re.search(r">x [\d.]+<", rows[2])


def test_the_command_writes_the_page(tmp_path):
    path = tmp_path / "plan.html"
    flags = ("--seq-len", "256", "--heads", "2", "--head-dim", "64", "--device", "a100")
    result = CliRunner().invoke(main, ["report", *flags, "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert re.fullmatch(rf"wrote {re.escape(str(path))}, [\d.]+ KiB\n", result.output)
    harmless(path.read_text(encoding="utf-8"))
    found = json.loads(CliRunner().invoke(main, ["report", *flags, "-o", str(path), "--json"]).output)
    assert found == {"file": str(path), "bytes": path.stat().st_size, "plan": found["plan"]}
    assert found["plan"].startswith("<Plan full() on a100: ")
    result = CliRunner().invoke(main, ["report", *flags, "-o", "/nowhere/plan.html"])
    assert result.exit_code == 2
    assert "cannot write '/nowhere/plan.html': No such file or directory" in result.output


# ----------------------------------------------------------------------------------------------------- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def chromium(folder, text, *arguments):
    """Show a page in headless Chromium; return what it prints, and what it logs to its console."""
    source = folder / "page.html"
    source.write_text(text, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --v=0"
    )
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *flags.split(), profile, *arguments, source.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@browser
def test_the_console_of_a_browser_stays_empty(million, tmp_path):
    dom, console = chromium(tmp_path, million, "--dump-dom")
    assert console == []
    read = Page(re.sub(r"</?(tbody|thead)>", "", dom))
    assert read.tags.count("svg") == 4
    assert read.tags.count("details") == million.count("<details>") > 4


@browser
def test_the_console_would_show_what_is_wrong(tmp_path):
    _, console = chromium(tmp_path, page("a", Html("<script>alert(1)</script>")), "--dump-dom")
    assert any("Content Security Policy" in line for line in console)


@browser
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)])
def test_a_page_fits_its_window(million, tmp_path, size):
    """Nothing may reach into the right margin, at the top of the page or further down."""
    shot = tmp_path / "shot.png"
    for height in (size[1], 6000):
        chromium(tmp_path, million, f"--window-size={size[0]},{height}", f"--screenshot={shot}")
        with image.open(shot) as picture:
            assert picture.size == (size[0], height)
            colours = picture.convert("RGB").crop((size[0] - 12, 0, size[0], height)).getcolors()
            assert len(colours) == 1
            assert len(picture.convert("RGB").getcolors(2**24)) > 50  # there is something to see


@browser
def test_a_page_that_does_not_fit_is_noticed(tmp_path):
    shot = tmp_path / "shot.png"
    wide = page("a", Html('<div style="width: 3000px; height: 40px; background: red"></div>'))
    chromium(tmp_path, wide, "--window-size=500,844", f"--screenshot={shot}")
    with image.open(shot) as picture:
        assert len(picture.convert("RGB").crop((488, 0, 500, 844)).getcolors()) > 1
