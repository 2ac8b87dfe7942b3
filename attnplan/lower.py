"""From a spec to a graph: one attend per branch over whole inputs, naive and obviously right."""

from __future__ import annotations

from attnplan.ir import Attend, Builder, Graph, Input, Mix, Output
from attnplan.patterns import Mixture, Pattern
from attnplan.patterns.sums import Conjunction
from attnplan.spec import AttentionSpec


def lower(spec: AttentionSpec) -> Graph:
    """Return the naive graph of ``spec``; a :class:`~attnplan.spec.Dim` counts as its maximum.

    Examples
    --------
    >>> print(lower(AttentionSpec(seq_len=8, heads=2, head_dim=4, dtype="float32", causal=True, scale=0.5)))
    %0 = input(tensor='q', heads=2, group=1, length=8, features=4, dtype='float32') : f32[B, 2, 8, 4]
    %1 = input(tensor='k', heads=2, group=1, length=8, features=4, dtype='float32') : f32[B, 2, 8, 4]
    %2 = input(tensor='v', heads=2, group=1, length=8, features=4, dtype='float32') : f32[B, 2, 8, 4]
    %3 = attend(%0, %1, %2, where=full() & causal(), scale=0.5)                     : f32[B, 2, 8, 4] + lse
    %4 = output(%3)                                                                 : f32[B, 2, 8, 4] + lse
    <BLANKLINE>
    """
    shape, group = spec.shape, spec.heads // spec.kv_heads
    builder = Builder()
    q = builder.add(Input("q", spec.heads, group, shape.seq_len, spec.head_dim, spec.dtype))
    k = builder.add(Input("k", spec.kv_heads, group, shape.kv_len, spec.head_dim, spec.dtype))
    v = builder.add(Input("v", spec.kv_heads, group, shape.kv_len, spec.value_dim, spec.dtype))
    attends = [
        builder.add(
            Attend(
                where=where,
                branch=branch,
                shift=None if spec.q_offset else shape.shift,
                scale=spec.softmax_scale,
                softcap=spec.softcap,
                dropout=spec.dropout,
                precision=spec.precision,
                biases=spec.biases,
            ),
            q,
            k,
            v,
        )
        for branch, where in enumerate(spec.branches)
    ]
    if not isinstance(spec.pattern, Mixture):
        return builder.build(builder.add(Output(sinks=spec.sink_logits), *attends))
    # Where positions arrive with the call a proof reads no condition, so a branch without heads stays too.
    taken = [b for b, where in enumerate(spec.branches) if spec.q_offset or _has_heads(where, spec.heads)] or [0]
    mixed = builder.add(
        Mix(
            rows=builder.type(q).rows,
            rule=spec.rule,
            branches=tuple(taken),
            count=len(attends),
            weights=spec.pattern.weights,
        ),
        *(attends[b] for b in taken),
    )
    return builder.build(builder.add(Output(sinks=spec.sink_logits), mixed))


def _has_heads(where: Pattern, heads: int) -> bool:
    """Return whether any head takes part: with fewer heads than groups some groups are empty."""
    conjunction = Conjunction.of(where)
    return any(conjunction.admits(h) for h in range(heads))
