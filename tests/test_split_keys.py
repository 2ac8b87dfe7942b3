"""Keys of few queries in pieces: packed documents of one kernel, joined as parts of one softmax."""

import pytest
import torch

from attnplan.runtime.split_keys import split_attention


def packed(q, k, v, cu_q, cu_k, rows, keys):
    """Attention of packed documents, one after the other, as flash-attn lays it out."""
    assert rows == int(cu_q.diff().max())
    assert keys == int(cu_k.diff().max())
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    outs, lses = [], []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        scores = torch.einsum("rhd,chd->hrc", q[a:b], k[c:d])
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("hrc,chd->rhd", scores.softmax(-1), v[c:d]))
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize(("rows", "keys", "heads", "kv_heads", "pieces"), [(5, 700, 4, 2, 3), (1, 1024, 3, 3, 2)])
def test_pieces_are_joined_to_the_whole_softmax(rows, keys, heads, kv_heads, pieces):
    torch.manual_seed(0)
    q = torch.randn(1, rows, heads, 16, dtype=torch.float64)
    k, v = (torch.randn(1, keys, kv_heads, 16, dtype=torch.float64) for _ in range(2))
    out, lse = split_attention(packed, q, k, v, pieces)
    ends = torch.tensor([0, rows]), torch.tensor([0, keys])
    whole, whole_lse = packed(q[0], k[0], v[0], *ends, rows, keys)
    assert out.shape == q.shape
    assert lse.shape == (1, heads, rows)
    torch.testing.assert_close(out[0], whole)
    torch.testing.assert_close(lse[0], whole_lse)
