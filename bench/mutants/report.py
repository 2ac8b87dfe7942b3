"""The figures, as JSON and as a page."""

from __future__ import annotations

import ast
import json
import platform
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from bench.mutants.corpus import CORPUS
from bench.mutants.judging import VERDICTS
from bench.mutants.pipelines import PIPELINES, TARGETS, TIME_LIMIT
from bench.mutants.syntax import parsed


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures: mutants by verdict, the rates, and how many wrong graphs were proved."""
    rows = list(rows)
    verdicts = Counter(row["verdict"] for row in rows)
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row["counts"])
    caught, survivors, broken = verdicts["caught"], verdicts["survivor"], verdicts["crash"] + verdicts["timeout"]
    return {
        "mutants": len(rows),
        **{verdict: verdicts[verdict] for verdict in VERDICTS},
        "rate": _rate(caught, survivors),
        "rate_with_crashes": _rate(caught + broken, survivors),
        "rate_crashes_missed": _rate(caught, survivors + broken),
        "graphs_refused": counts["refused"],
        "graphs_wrong_but_proved": counts["wrong"],
        "graphs_broken_but_proved": counts["broken"],
    }


def _rate(found: int, missed: int) -> float:
    return round(found / (found + missed), 4) if found + missed else 1.0


def document(rows: Sequence[Mapping[str, Any]], seconds: float, jobs: int) -> dict[str, Any]:
    """Return everything that a run found, as plain data."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jobs": jobs,
        "seconds": round(seconds),
        "sources": {m: sha256(ast.unparse(parsed(m)).encode()).hexdigest()[:16] for m in TARGETS},
        "pipelines": {label: [p.name for p in passes] for label, passes in PIPELINES.items()},
        "corpus": {name: spec.to_dict() for name, spec in CORPUS.items()},
        "summary": summary(rows),
        "mutants": list(rows),
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a run with one line per spec and per mutant, so that two runs can be compared."""
    lines = [
        f'"{key}": {_lines(value) if key in ("corpus", "mutants") else json.dumps(value)}'
        for key, value in data.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _lines(value: Any) -> str:
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}"
    return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"


EXPLANATIONS: Mapping[tuple[str, str], str] = {}
"""Why the proof passes wrong or broken graphs of a mutant, by its original and mutated code."""

METHOD = """\
# How strong the proof is

Every pass is proved: after lowering and after each rewrite the types are inferred again, and the coverage of the graph
is compared with that of the spec (`attnplan/ir/coverage.py`). This page measures how much such a proof finds, by
breaking the rewrites on purpose.

<!-- Written by `python -m bench.mutants --from bench/results/mutants.json --docs docs/mutants.md`; do not edit. -->

## Method

`bench/mutants/` changes one node of the syntax tree of one module at a time. The modules are lowering and the passes;
`passes/pipeline.py` is left out, for it is the prover and no rewrite:

{targets}

The kinds of mutation:

| kind | |
|---|---|
| constant | an int one higher or one lower |
| comparison | `<` and `<=`, `>` and `>=`; the opposites of `==`, `in` and `is` |
| arithmetic | `+` and `-`, `//` and `%`, `*` to `+`, a minus sign removed |
| logic | `and` for `or`, `not` removed |
| negated condition | of an `if` |
| dropped element | of a tuple, list, call, comprehension or chain of conditions |
| dropped statement | a `pass` in its place |
| swap | index 0 for 1, `min` for `max`, `any` for `all`; neighbouring elements, or the first and the last argument |
| mix-up | a name or attribute for its counterpart: `q` for `k`, `seq_len` for `kv_len`, `first` for `last`, ... |

Docstrings, annotations, imports, declarations and error messages stay as they are.

Each mutant compiles {small} small specs and {large} of about a million positions through each of these pipelines that
its module takes part in:

{pipelines}

Nothing is written to disk: the mutated module takes the place of the original inside a worker process, which is killed
after {limit:.0f} s. Where the proof passes and the final graph of a small spec is another than the unmutated one, its
inputs are compared with the tensors of the spec, the float64 interpreter runs it, and output, LSE and gradients are
compared with those of the graph that the unmutated `lower` makes. A graph that takes other tensors, or that the
interpreter cannot run, is broken; one with other numbers is wrong.

| verdict | |
|---|---|
| caught | for some spec, lowering, a pass or the proof after it raised an error of attnplan's own |
| survivor | all proofs passed, and for some spec the graph is wrong or broken |
| crash, timeout | Python raised an error of its own, or did not end: found, but not by the proof |
| same meaning | other graphs, which mean the same |
| identical | the same graphs for the whole corpus |

The rate is caught / (caught + survivors). A verdict is about the whole corpus; the stricter question is whether the
proof ever let a wrong or broken graph pass, even one of a mutant that it caught with another spec. Both are answered
below.
"""


def render(data: Mapping[str, Any]) -> str:
    """Return ``docs/mutants.md`` for a run."""
    small = sum(spec["seq_len"] < 1000 for spec in data["corpus"].values())
    method = METHOD.format(
        targets="\n".join(f"- `{module.replace('.', '/')}.py`" for module in data["sources"]),
        small=small,
        large=len(data["corpus"]) - small,
        pipelines="\n".join(f"- {label}: `{', '.join(names)}`" for label, names in data["pipelines"].items()),
        limit=TIME_LIMIT,
    )
    rows = data["mutants"]
    return "\n".join([method, *_figures(data), *_survivors(rows), *_escapes(rows)]).rstrip() + "\n"


def _figures(data: Mapping[str, Any]) -> list[str]:
    rows, figures = data["mutants"], data["summary"]
    by = Counter(part for row in rows if row["verdict"] == "caught" for part in row["by"])
    errors = Counter(name for row in rows if row["verdict"] == "crash" for name in row["by"])
    return [
        "## Figures",
        "",
        _paragraph(
            f"The proof caught **{figures['caught']} of {figures['caught'] + figures['survivor']}** mutants that "
            f"change behaviour without a crash: **{figures['rate']:.1%}**. With crashes and timeouts counted as found "
            f"it is {figures['rate_with_crashes']:.1%}, with them counted as missed "
            f"{figures['rate_crashes_missed']:.1%}. Crashes are calls with a missing argument, unknown attributes and "
            f"the like ({_most_common(errors)}); where Python raises there is no graph to be proved."
        ),
        "",
        _paragraph(
            f"The types refused graphs of {by['types']} mutants, the coverage graphs of {by['coverage']}. In all, "
            f"{figures['graphs_refused']} compilations were refused, and {figures['graphs_wrong_but_proved']} wrong "
            f"and {figures['graphs_broken_but_proved']} broken graphs were let pass."
        ),
        "",
        _paragraph(
            f"One run of {figures['mutants']} mutants: Python {data['python']}, torch {data['torch']}, {data['jobs']} "
            f"processes on a shared machine, {data['seconds']} s."
        ),
        "",
        *_table(rows, "file"),
        *_table(rows, "kind"),
    ]


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _most_common(errors: Counter[str], count: int = 3) -> str:
    return ", ".join(f"{n} {name}" for name, n in errors.most_common(count))


def _table(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    head = [f"| {key} | mutants | {' | '.join(VERDICTS)} | rate |", "|---" + "|--:" * (len(VERDICTS) + 2) + "|"]
    return [*head, *(_line([r for r in rows if r[key] == name], name) for name in sorted({r[key] for r in rows})), ""]


def _line(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    figures = summary(rows)
    cells = [len(rows), *(figures[verdict] or "" for verdict in VERDICTS), f"{figures['rate']:.1%}"]
    return f"| {name} | {' | '.join(map(str, cells))} |"


def _survivors(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    survivors = [row for row in rows if row["verdict"] == "survivor"]
    return ["## Survivors", "", *([explained(row) for row in survivors] or ["None.\n"])]


def _escapes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    escapes = [row for row in rows if row["verdict"] == "caught" and ("wrong" in row or "broken" in row)]
    title = ["## Wrong graphs of caught mutants", ""]
    if not escapes:
        return [*title, "None.\n"]
    text = "These mutants were caught, but by other specs than some whose meaning they changed."
    return [*title, text, "", *(explained(row) for row in escapes)]


def explained(row: Mapping[str, Any]) -> str:
    """Return the list item of a mutant, with the specs that it got past the proof and the reason."""
    where = {o: sorted({spec.split("/")[0] for spec in row[o]}) for o in ("wrong", "broken") if o in row}
    specs = "; ".join(f"{outcome}: {_some(names)}" for outcome, names in where.items())
    reason = EXPLANATIONS.get((row["original"], row["mutated"]), "not yet explained")
    return f"{_change(row)}\n\n" + textwrap.indent(_paragraph(f"({specs}.) {reason}"), "  ") + "\n"


def _some(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _change(row: Mapping[str, Any]) -> str:
    return f"- `{row['file']}`, line {row['line']}: `{row['original']}` to `{row['mutated']}`"
