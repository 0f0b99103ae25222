"""generate_varlen_parameters: values, and every rule with the exception type of NATTEN 0.21."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vicus.varlen import generate_varlen_parameters


def packed(q_len, kv_len, batch=1):
    return torch.zeros(batch, q_len, 2, 4), torch.zeros(batch, kv_len, 1, 4), torch.zeros(batch, kv_len, 1, 3)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6))
def test_values(lengths):
    q, kv = zip(*lengths, strict=True)
    cumulative_q, cumulative_kv, max_q, max_kv = generate_varlen_parameters(
        *packed(sum(q), sum(kv)), int32(*q), int32(*kv)
    )
    for cumulative, wanted in ((cumulative_q, q), (cumulative_kv, kv)):
        assert cumulative.dtype == torch.int32
        assert cumulative.is_contiguous()
        assert cumulative[0] == 0
        assert cumulative.diff().tolist() == list(wanted)
    assert (max_q, max_kv) == (max(q), max(kv))
    assert type(max_q) is type(max_kv) is int


def test_without_sequences():
    assert generate_varlen_parameters(*packed(5, 7, batch=3)) == (None, None, 0, 0)


@pytest.mark.parametrize(
    ("tensors", "q", "kv", "words"),
    [
        (packed(5, 5), int32(5), None, "seqlens_KV is a NoneType"),
        (packed(5, 5), None, int32(5), "seqlens_Q is a NoneType"),
        (packed(5, 5), [5], int32(5), "seqlens_Q is a list"),
        (packed(5, 5), int32(5).long(), int32(5), r"seqlens_Q\.dtype is torch\.int64"),
        (packed(5, 5), int32(5), int32(5).float(), r"seqlens_KV\.dtype is torch\.float32"),
        (packed(5, 5), int32(5)[None], int32(5), r"seqlens_Q\.shape is \(1, 1\)"),
        (packed(5, 5), int32(5), int32(5)[0], r"seqlens_KV\.shape is \(\)"),
        (packed(0, 0), int32(), int32(), "at least one sequence"),
        (packed(5, 5), int32(2, 3), int32(5), r"seqlens_KV\.shape is \(1,\); allowed: that of seqlens_Q, \(2,\)"),
        (packed(5, 5, batch=2), int32(5), int32(5), r"query\.shape\[0\] is 2"),
        (packed(5, 5), int32(5), int32(5).to("meta"), r"seqlens_KV\.device is meta"),
        (packed(5, 5), int32(6, -1), int32(2, 3), "seqlens_Q is -1 at its least"),
        (packed(5, 5), int32(2, 3), int32(2, 2), "sum of seqlens_KV is 4; allowed: the tokens there are, 5"),
        (packed(5, 5), int32(2, 4), int32(2, 3), "sum of seqlens_Q is 6"),
    ],
)
def test_rules(tensors, q, kv, words):
    with pytest.raises(ValueError, match=words):
        generate_varlen_parameters(*tensors, q, kv)


@pytest.mark.parametrize("wrong", [1, 2])
def test_batches_agree(wrong):
    tensors = list(packed(5, 5))
    tensors[wrong] = tensors[wrong].expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="batch size of query, key and value"):
        generate_varlen_parameters(*tensors)


def test_not_inside_a_compiled_region():
    compiled = torch.compile(generate_varlen_parameters, backend="eager", fullgraph=True)
    # Dynamo reports what the traced function raises in its own way; the words are ours.
    with pytest.raises(RuntimeError, match="call it ahead"):
        compiled(*packed(5, 5), int32(5), int32(5))
    assert compiled(*packed(5, 5)) == (None, None, 0, 0)
