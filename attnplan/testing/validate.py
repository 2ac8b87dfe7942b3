"""Cross-validation: runs what accepts a spec beside the reference, and says why the rest does not run."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import attrs
import torch

from attnplan.api import fingerprint
from attnplan.backends import registry
from attnplan.calls import require_here
from attnplan.cost import Target, resolve
from attnplan.errors import AttnPlanError, SpecError, did_you_mean
from attnplan.plan import Plan
from attnplan.search import Candidate, Found, every_way, without_schedules
from attnplan.spec import AttentionSpec
from attnplan.testing.anchor import anchored
from attnplan.testing.catalogue import Case, catalogue
from attnplan.testing.matrix import AGREES, DIFFERS, FAILED, REFUSED, Matrix, Report, Result
from attnplan.testing.numbers import Call, Numbers, relative, relative_lse
from attnplan.testing.reference import dense_attention
from attnplan.verify import TOLERANCES, Check

LSE_TOLERANCES = {"float64": 1e-12, "float32": 2e-6, "float16": 1e-4, "bfloat16": 1e-4}
"""LSE is float32 for half precision too."""
GRADIENT_RATIO, DEVICE_RATIO = 1.5, 2.0
"""Largest error over that of dense attention by torch: of gradients in half precision; of anything on a GPU."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_ROUNDED_ONCE = {"float32": 1e-6, "float16": 2**-12, "bfloat16": 2**-9}
"""Relative L2 error that nothing in a dtype is blamed for, however well torch happens to do."""


def cross_validate(
    spec: AttentionSpec | Case,
    device: object = "auto",
    backends: str | Sequence[str] = "all",
    seed: int = 0,
    repeat: int = 1,
) -> Matrix:
    """Run every strategy, backend and schedule that accepts a spec, and compare it with float64.

    Output, LSE, and the gradients of q, k and v from random upstream gradients of output and LSE are compared on all
    query rows, or on a sample where all would be more than 2^24 pairs.

    Parameters
    ----------
    spec
        A spec, whose operands are drawn at random, or a :class:`~attnplan.testing.Case`, which brings its own.
    device
        As in :func:`attnplan.compile`; it must be here.
    backends
        ``"all"``, or names of backends.
    seed
        Seed of inputs, operands and upstream gradients.
    repeat
        Timed calls after the first one, which is compared.

    Returns
    -------
    Matrix
        Errors, tolerances and times, or every reason of a refusal. Call :meth:`~attnplan.testing.Matrix.check` to
        raise where something is wrong.

    Raises
    ------
    SpecError
        If an argument is no spec, an unknown backend, or out of range.
    NoBackendError
        If the device is not here.

    Notes
    -----
    Tolerances, as relative L2 errors: float64 1e-12; float32 2e-6; half precision 4e-3 (bfloat16) and 1e-3 (float16)
    for the output, 1e-4 for the LSE, and 1.5 times what dense SDPA loses in the dtype on the same tensors for
    gradients. On a GPU everything but float64 and the LSE may err by twice what SDPA (cuDNN) does, at least 2e-6 in
    float32. Rows that see no key must have output 0, LSE -inf and no gradient, exactly.

    Examples
    --------
    >>> from attnplan import AttentionSpec, patterns as P
    >>> spec = AttentionSpec(seq_len=40, heads=2, head_dim=8, pattern=P.window(5), dtype="float32")
    >>> cross_validate(spec, device="cpu").agrees
    True
    """
    if not isinstance(spec, AttentionSpec | Case):
        raise SpecError(f"cross_validate needs an AttentionSpec or a Case, got {type(spec).__name__}")
    if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
        raise SpecError(f"repeat must be a positive int, got {repeat!r}")
    wanted = chosen_backends(backends)
    case = spec if isinstance(spec, Case) else Case(repr(spec.pattern), spec)
    target = resolve(device)
    require_here(target)
    operands = case.operands if isinstance(spec, Case) else None
    comparison = _Comparison(Call.random(case.called, operands, str(target.torch_device), seed))
    results = []
    for candidate, found in every_way(case.spec, target):
        if candidate.backend in wanted:
            results.append(_result(candidate, found, case.spec, target, comparison, repeat))
    results += [Result("", name, "", REFUSED, reasons=(why,)) for name, why in _absent(wanted, target)]
    shape = case.called.shape
    rows = f"{len(comparison.call.rows)} of {shape.seq_len}"
    words = spec_in_words(case.spec)
    return Matrix(case.name, words, tuple(results), comparison.anchor_name, rows, case.fault, case.source)


def cross_validate_catalogue(
    device: object = "auto",
    backends: str | Sequence[str] = "all",
    size: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    repeat: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> Report:
    """Cross-validate every case of the catalogue.

    Parameters
    ----------
    device, backends, seed, repeat
        As in :func:`cross_validate`.
    size
        As in :func:`~attnplan.testing.catalogue`; the default is ``"large"`` on a GPU and ``"small"`` elsewhere.
    dtype
        The default is bfloat16 on a GPU and float32 elsewhere.
    advance
        Called after each case.

    Raises
    ------
    SpecError, NoBackendError
        As in :func:`cross_validate`.

    Examples
    --------
    >>> cross_validate_catalogue("cpu", size="huge")
    Traceback (most recent call last):
    ...
    attnplan.errors.SpecError: unknown size 'huge'; known: large, small
    """
    target = resolve(device)
    require_here(target)
    on_gpu = target.device.kind != "cpu"
    size, dtype = size or ("large" if on_gpu else "small"), dtype or ("bfloat16" if on_gpu else "float32")
    matrices = []
    for case in catalogue(size, dtype).values():
        matrices.append(cross_validate(case, device, backends, seed, repeat))
        advance()
    name = target.device.title if on_gpu else "CPU"  # that of a CPU tells its clock, which varies from run to run
    return Report(name, size, dtype, (versions(),), tuple(matrices))


def chosen_backends(backends: str | Sequence[str]) -> tuple[str, ...]:
    """Return names of backends; raise :class:`~attnplan.errors.SpecError` for one that does not exist.

    Examples
    --------
    >>> chosen_backends("eager,reference")
    ('eager', 'reference')
    """
    known = registry()
    if backends == "all":
        return (*known.backends, *known.broken)
    names = tuple(n.strip() for n in backends.split(",")) if isinstance(backends, str) else tuple(backends)
    if not names:
        raise SpecError('no backend to cross-validate: name some, or say "all"')
    every = [*known.backends, *known.broken]
    for name in names:
        if name not in every:
            raise SpecError(f"unknown backend {name!r}{did_you_mean(str(name), every)}")
    return names


def versions() -> dict[str, str]:
    """Return the installed version of every package that a registered backend or a plan depends on."""
    found = dict(part.rsplit(" ", 1) for part in fingerprint().split(", "))
    for backend in registry().backends.values():
        found |= {name: version for name, version in backend.versions().items() if version is not None}
    return found


def spec_in_words(spec: AttentionSpec) -> str:
    """Return a spec in one line, the same in every process."""
    fields = {name: getattr(spec, name) for name in attrs.fields_dict(AttentionSpec) if name != "pattern"}
    plain = AttentionSpec(seq_len=spec.seq_len, heads=spec.heads, head_dim=spec.head_dim)
    kept = [
        f"{n}={v!r}"
        for n, v in fields.items()
        if n in ("seq_len", "heads", "head_dim", "dtype") or v != getattr(plain, n)
    ]
    return ", ".join([_ADDRESS.sub("", repr(spec.pattern)), *kept])


def _absent(wanted: Sequence[str], target: Target) -> Iterator[tuple[str, str]]:
    """Iterate over wanted backends that are no candidate at all, with the reason."""
    absent = without_schedules(target.device) | registry().broken
    yield from ((name, why) for name, why in absent.items() if name in wanted)


class _Comparison:
    """A call, and what it should give; computed once for all ways to run it."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.anchor_name = ""
        self.expected = lru_cache(maxsize=2)(self._expected)
        self.anchor_errors = lru_cache(maxsize=2)(self._anchor_errors)

    def _expected(self, through_lse: bool) -> Numbers:
        return self.call.by_autograd("float64", through_lse, dense_attention)

    def _anchor_errors(self, through_lse: bool) -> dict[str, float]:
        self.anchor_name, anchor = anchored(self.call, through_lse)
        pairs = zip(anchor.items(), self.expected(through_lse).items(), strict=True)
        return {name: relative(got, want) for (name, got), (_, want) in pairs}

    def tolerance(self, name: str, through_lse: bool) -> float:
        """Return the largest error of the output or of a gradient."""
        dtype, on_gpu = self.call.spec.dtype, self.call.rows.device.type != "cpu"
        if dtype == "float64" or (dtype == "float32" and not on_gpu) or (name == "output" and not on_gpu):
            return TOLERANCES[dtype]
        allowed = max(self.anchor_errors(through_lse)[name], _ROUNDED_ONCE[dtype])
        return (DEVICE_RATIO if on_gpu else GRADIENT_RATIO) * allowed

    def checks(self, got: Numbers, through_lse: bool) -> Iterator[Check]:
        """Iterate over the comparisons of a way that ran."""
        want = self.expected(through_lse)
        for (name, ours), (_, exact) in zip(got.items(), want.items(), strict=True):
            yield Check(name, relative(ours, exact), self.tolerance(name, through_lse))
            if name == "output" and want.lse is not None and got.lse is not None:
                yield Check("lse", relative_lse(got.lse, want.lse), LSE_TOLERANCES[self.call.spec.dtype])
        empty = self.call.empty
        if empty.any():
            yield Check("empty rows", float(torch.cat([got.out[empty], got.dq[empty]], -1).abs().max()), 0.0)


def _result(
    candidate: Candidate, found: Found | None, spec: AttentionSpec, target: Target, with_: _Comparison, repeat: int
) -> Result:
    empty = Result(candidate.strategy, candidate.backend, candidate.schedule, REFUSED)
    if found is None:
        return attrs.evolve(empty, reasons=candidate.reasons)
    try:
        plan = Plan(spec, target, found, {}, strict=True)  # another kernel in its place would prove nothing
        through = spec.has_lse and plan.program.differentiable_lse
        got = with_.call.by_plan(plan, through)
        seconds = statistics.median(_timed(with_.call, plan, through) for _ in range(repeat))
    except Exception as error:  # whatever a kernel raises is a finding, and must not hide those of the others
        return attrs.evolve(empty, status=FAILED, reasons=(_words(error),))
    checks = tuple(with_.checks(got, through))
    notes = () if through or not spec.has_lse else ("the LSE is not differentiable: gradients are those of the output",)
    status = AGREES if all(c.passed for c in checks) else DIFFERS
    return attrs.evolve(empty, status=status, checks=checks, seconds=seconds, reasons=notes)


def _timed(call: Call, plan: Plan, through_lse: bool) -> float:
    _wait(call)
    start = time.perf_counter()
    call.by_plan(plan, through_lse)
    _wait(call)
    return time.perf_counter() - start


def _wait(call: Call) -> None:
    if call.rows.is_cuda:
        torch.cuda.synchronize(call.rows.device)


def _words(error: Exception) -> str:
    text = str(error).strip()
    return text if isinstance(error, AttnPlanError) else f"{type(error).__name__}: {text}"
