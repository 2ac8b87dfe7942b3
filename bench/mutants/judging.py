"""What one mutant does to the corpus, beside the unmutated code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import attrs
import torch

from attnplan.errors import SpecError, VerifyError
from attnplan.ir import Graph, Input
from attnplan.ir.coverage import Coverage, spec_coverage
from attnplan.lower import lower
from attnplan.passes import Pass, Pipeline
from attnplan.runtime.interpreter import interpret
from attnplan.spec import AttentionSpec
from bench.mutants.corpus import CORPUS, LARGE, SMALL
from bench.mutants.pipelines import PIPELINES, REFUSALS, TOLERANCE


@attrs.frozen
class Compiler:
    """Lowering and passes, one module of which may be mutated."""

    lower: Callable[[AttentionSpec], Graph]
    pipelines: Mapping[str, Pipeline]

    @classmethod
    def load(cls, name: str | None = None, source: str = "") -> Compiler:
        """Return the compiler with ``source`` in place of the module ``name``, or the unmutated one."""
        module = ModuleType(name or "none")
        exec(compile(source, f"<mutant of {name}>", "exec"), module.__dict__)
        made = vars(module)
        return cls(
            lower=made["lower"] if name == lower.__module__ else lower,
            pipelines={
                label: Pipeline(tuple(_mutated(p, made) if p.__module__ == name else p for p in passes))
                for label, passes in PIPELINES.items()
            },
        )

    def run(self, spec: AttentionSpec, pipeline: str, expected: Coverage) -> Graph:
        """Return the final graph of a spec, proved after lowering and after every pass."""
        return self.pipelines[pipeline].run(self.lower(spec), expected)[0]


def _mutated(original: Pass, made: Mapping[str, Any]) -> Pass:
    """Return the pass of a mutated module that has the options of ``original``."""
    result: Pass = made[type(original).__name__](**attrs.asdict(original, recurse=False))
    return result


Meaning = list[torch.Tensor]
Verdict = dict[str, Any]
Result = tuple[int, Verdict]


def meaning(graph: Graph, spec: AttentionSpec) -> Meaning:
    """Return output, LSE and gradients of a graph on fixed random inputs, in float64.

    Raises
    ------
    SpecError
        If the graph does not take the tensors of the spec.
    """
    random_numbers = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(spec.batch, *sizes, generator=random_numbers, dtype=torch.float64)

    shape = spec.shape
    q = draw(spec.heads, shape.seq_len, spec.head_dim).requires_grad_()
    k = draw(spec.kv_heads, shape.kv_len, spec.head_dim).requires_grad_()
    v = draw(spec.kv_heads, shape.kv_len, spec.value_dim).requires_grad_()
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        op = graph.inputs[name].op
        if not isinstance(op, Input) or (op.heads, op.length, op.features) != tensor.shape[1:]:
            raise SpecError(f"the graph takes another {name}: {op}")
    out, lse = interpret(graph, q, k, v, operands(spec), shape)
    upstream, upstream_lse = draw(*out.shape[1:]), draw(*out.shape[1:-1])
    loss = (out * upstream).sum()
    if lse is not None:
        loss = loss + (upstream_lse * lse.masked_fill(lse.isinf(), 0)).sum()
    gradients = torch.autograd.grad(loss, (q, k, v), allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (out, lse, *gradients) if t is not None]


def operands(spec: AttentionSpec) -> dict[str, Any]:
    """Return values for the runtime operands of a spec."""
    keys = spec.shape.kv_len
    values = {
        "documents": torch.tensor([0, 5, 7, keys]),
        "key_padding": torch.arange(keys) >= torch.tensor([[3], [0]]),
        "q_offset": torch.tensor(7),
    }
    return {name: values[name] for name in spec.operands}


def compare(graph: Graph, spec: AttentionSpec, expected: Meaning) -> str:
    """Return whether a graph means what is expected: ``"equal"``, ``"wrong"``, or ``"broken"`` if it cannot be run."""
    try:
        got = meaning(graph, spec)
    except Exception:  # whatever a graph that should not exist does to the interpreter
        return "broken"
    alike = len(got) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        for a, b in zip(got, expected, strict=True)
    )
    return "equal" if alike else "wrong"


@attrs.frozen
class Baseline:
    """What the unmutated compiler makes of the corpus."""

    expected: Mapping[str, Coverage]
    graphs: Mapping[tuple[str, str], Graph]
    meanings: Mapping[str, Meaning]
    known: dict[tuple[str, Graph], str] = attrs.field(factory=dict)
    """Comparisons made before: many mutants make the same graph."""

    @classmethod
    def compute(cls) -> Baseline:
        """Compile and interpret the corpus.

        Raises
        ------
        VerifyError
            If the unmutated pipelines do not agree on a spec.
        """
        compiler = Compiler.load()
        expected = {name: spec_coverage(spec) for name, spec in CORPUS.items()}
        graphs = {
            (name, pipeline): compiler.run(spec, pipeline, expected[name])
            for name, spec in CORPUS.items()
            for pipeline in PIPELINES
        }
        meanings = {name: meaning(compiler.lower(spec), spec) for name, spec in SMALL.items()}
        for (name, pipeline), graph in graphs.items():
            if name in SMALL and compare(graph, SMALL[name], meanings[name]) != "equal":
                raise VerifyError(f"the unmutated pipeline {pipeline!r} changes the meaning of {name!r}")
        return cls(expected, graphs, meanings)

    def outcome(self, compiler: Compiler, name: str, pipeline: str) -> tuple[str, str]:
        """Return what became of a spec: one of :data:`OUTCOMES`, and by what it was refused or crashed."""
        try:
            graph = compiler.run(CORPUS[name], pipeline, self.expected[name])
        except REFUSALS as error:
            return "refused", "coverage" if isinstance(error, VerifyError) else "types"
        except Exception as error:  # whatever a mutant does
            return "crash", type(error).__name__
        if graph == self.graphs[name, pipeline]:
            return "same", ""
        return ("unknown" if name in LARGE else self._compared(name, graph)), ""

    def _compared(self, name: str, graph: Graph) -> str:
        if (name, graph) not in self.known:
            self.known[name, graph] = compare(graph, SMALL[name], self.meanings[name])
        return self.known[name, graph]


VERDICTS = ("caught", "survivor", "crash", "timeout", "same meaning", "identical")
"""The first that applies is a mutant's verdict."""
OUTCOMES: Mapping[str, str] = {
    "refused": "caught",
    "wrong": "survivor",
    "broken": "survivor",
    "crash": "crash",
    "equal": "same meaning",
    "unknown": "same meaning",
    "same": "identical",
}
"""What may become of one spec, and the verdict that it points to. ``unknown`` is another graph of a large spec."""


def judge(outcomes: Iterable[tuple[str, str, str, str]]) -> Verdict:
    """Return the verdict over (spec, pipeline, outcome, details) of a whole corpus, with the evidence."""
    found: dict[str, list[str]] = {}
    details: Counter[str] = Counter()
    for name, pipeline, outcome, detail in outcomes:
        found.setdefault(outcome, []).append(f"{name}/{pipeline}")
        if detail:
            details[detail] += 1
    verdict = min((OUTCOMES[o] for o in found), key=VERDICTS.index)
    evidence = {o: found[o] for o in ("wrong", "broken") if o in found}
    counts = {outcome: len(specs) for outcome, specs in found.items()}
    return {"verdict": verdict, "by": dict(details), "counts": counts} | evidence


def examine(name: str, source: str, baseline: Baseline) -> Verdict:
    """Return the verdict on one mutated module."""
    try:
        compiler = Compiler.load(name, source)
    except Exception as error:
        return {"verdict": "crash", "by": {type(error).__name__: 1}, "counts": {}}
    return judge((n, p, *baseline.outcome(compiler, n, p)) for n in CORPUS for p in _pipelines(name))


def _pipelines(module: str) -> list[str]:
    """Return the pipelines that a module takes part in."""
    return [n for n, passes in PIPELINES.items() if module in (lower.__module__, *(p.__module__ for p in passes))]
