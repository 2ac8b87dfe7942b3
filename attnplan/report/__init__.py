"""One HTML page with everything about a plan: no scripts, no outside resources, readable on a phone."""

from __future__ import annotations

from importlib.metadata import version

from attnplan import explain
from attnplan.pictures import require_matplotlib
from attnplan.plan import Plan
from attnplan.report import sections
from attnplan.report.html import page, tag

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


def report(plan: Plan) -> str:
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
        would change, the emitted program where torch is installed, and the spec as TOML. It loads nothing from
        elsewhere, and runs no script.

    Raises
    ------
    AttnPlanError
        If matplotlib is missing.
    RingError
        If the plan is for several ranks.

    Examples
    --------
    >>> from attnplan.report import html
    >>> html.page("<a plan>", html.tag("p", "2 < 3"))[-32:]  # every text is escaped
    '<p>2 &lt; 3</p>\n</body>\n</html>\n'
    """
    require_matplotlib()
    explain.require_one_device(plan, "a report")
    facts = explain.facts(plan)
    made = tag("footer", f"Written by attnplan {version('attnplan')}.")
    shown = [section(plan, facts) for section in _SECTIONS]
    return page(f"{facts['choice']['name']}: {facts['spec']['title']}", *shown, made)
