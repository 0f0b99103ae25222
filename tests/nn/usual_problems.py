"""A causal layer as the chooser sees it, on a Hopper GPU and on a CPU."""

import dataclasses

from vicus.nn import Problem

HOPPER = Problem(
    device="cuda",
    architecture=(9, 0),
    cudnn=91900,
    num_heads=16,
    num_groups=16,
    head_dim_qk=128,
    head_dim_v=128,
    max_seqlen_q=8192,
    max_seqlen_kv=8192,
    attn_mask_type="causal",
    window_size=(-1, 0),
    bottom_right_diagonal=False,
)
CPU = dataclasses.replace(HOPPER, device="cpu", architecture=None, cudnn=None)
