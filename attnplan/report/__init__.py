"""One HTML page with everything about a plan: no scripts, no outside resources, readable on a phone."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from attnplan.pictures import require_matplotlib
from attnplan.plan import Plan
from attnplan.report import ring_sections, sections
from attnplan.report.html import page, tag

if TYPE_CHECKING:
    from attnplan.plan_ring import RingPlan

_SECTIONS = (
    sections.summary,
    sections.mask,
    sections.passes,
    sections.ops,
    sections.candidates,
    sections.what_ifs,
    sections.source,
    sections.spec_text,
)
_RING_SECTIONS = (
    ring_sections.summary,
    sections.mask,
    ring_sections.transfers,
    ring_sections.candidates,
    sections.spec_text,
)


def report(plan: Plan | RingPlan) -> str:
    r"""Return an HTML page about a plan.

    Parameters
    ----------
    plan
        The plan, for a device that is here or not.

    Returns
    -------
    str
        A whole page: the choice and its figures with their basis, the mask, the passes and the graph after each, every
        op with its share of the time, the roofline, every candidate with its prediction or refusal, what other devices
        would change, the emitted program where torch is installed, and the spec as TOML. For a plan over several ranks:
        who sends what to whom, hop by hop, and every layout and transport. It loads nothing from elsewhere, and runs
        no script.

    Raises
    ------
    AttnPlanError
        If matplotlib is missing.

    Examples
    --------
    >>> from attnplan.report import html
    >>> html.page("<a plan>", html.tag("p", "2 < 3"))[-32:]  # every text is escaped
    '<p>2 &lt; 3</p>\n</body>\n</html>\n'
    """
    require_matplotlib()
    facts = plan.explain("json")
    made = tag("footer", f"Written by attnplan {version('attnplan')}.")
    parts: Any = _RING_SECTIONS if getattr(plan, "ranks", 1) > 1 else _SECTIONS
    shown = [section(plan, facts) for section in parts]
    return page(f"{facts['choice']['name']}: {facts['spec']['title']}", *shown, made)
