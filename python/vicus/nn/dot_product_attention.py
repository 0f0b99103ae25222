"""The attention layer between projections, with the interface of Transformer Engine's `DotProductAttention`."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
import torch.utils.checkpoint
from torch import Tensor, nn

from vicus import _arguments
from vicus._arguments import wrong
from vicus.nn import _arguments_layer as arguments
from vicus.nn import _random, choice, problem
from vicus.nn.backends import BACKENDS, Call, cudnn_facts
from vicus.nn.problem import Neighborhood, Problem

__all__ = ["DotProductAttention"]


class DotProductAttention(nn.Module):
    """Attention of given queries, keys and values, by the backend that suits each call (`vicus.nn.choice`).

    Names, order, defaults and meaning of the arguments are those of Transformer Engine 2; it runs on CPU tensors too. A
    token that is padding, or a query that sees no key, has output 0 and gradient 0.

    Args:
        num_attention_heads: Query heads of the whole model.
        kv_channels: Head dim, or (of query and key, of value).
        num_gqa_groups: Key/value heads, a divisor of `num_attention_heads`; None for as many. 1 is multi-query
            attention. Nothing is repeated in memory.
        attention_dropout: Probability that an attention weight is dropped, while training.
        qkv_format: "sbhd", "bshd" or "thd": order of sequence, batch, heads and head dim; t are all tokens of packed
            sequences.
        attn_mask_type: "no_mask", "padding", "causal", "padding_causal", "causal_bottom_right",
            "padding_causal_bottom_right" or "arbitrary"; Megatron's enum too. Causal masks have their diagonal in the
            top left corner unless they say otherwise. None means "causal", and "no_mask" with `neighborhood`.
        window_size: Keys (left, right) of the diagonal that a query sees besides it; None, (-1, -1) and (-1, 0) for no
            bound. The diagonal is that of the causal mask, otherwise see `bottom_right_diagonal`.
        bottom_right_diagonal: Where window and ALiBi have their diagonal without a causal mask: None and True for the
            bottom right corner, of each sequence if there is padding; False for the top left one.
        sequence_parallel: As in Transformer Engine: random numbers come from PyTorch's generator then.
        tp_size: Ranks that share the heads. The layer holds its part of them and communicates nothing.
        get_rng_state_tracker: Returns an object whose `fork()` is a context for random numbers of dropout, such as
            Megatron's.
        tp_group: Process group of those ranks; its size is taken in place of `tp_size`.
        layer_number: Kept for the caller.
        attention_type: "self" or "cross".
        cp_group: None: there is no context parallelism.
        cp_global_ranks, cp_stream, cp_comm_type: No effect.
        softmax_scale: Factor of query times key, used as given; None for one over the root of the head dim.
        softmax_type: "vanilla"; "off-by-one" (every query also sees a key of logit 0 and value 0); "learnable" (of a
            logit per head, the parameter `softmax_offset` `[heads]`): attention sinks.
        return_max_logit: Whether to return the largest score of each head too.
        name: Kept for the caller.
        softcap: Bounds scaled scores, before "post_scale_bias" and "alibi": `softcap * tanh(score / softcap)`; 0 for
            none.
        neighborhood: Makes this a neighborhood layer: a `Neighborhood`, or a dict of its arguments.
        attention_backend: "auto", or the only backend that may be used: "flash", "fused" or "unfused".

    Raises:
        ValueError: An argument out of its range.
        NotImplementedError: `cp_group` is given.

    Source:
        Transformer Engine 2 (interface); `softcap`, `neighborhood` and `attention_backend` of vicus.
    """

    softmax_offset: Tensor | None

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: Any = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Sequence[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
        *,
        softcap: float = 0.0,
        neighborhood: Neighborhood | Mapping[str, Any] | None = None,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        heads = arguments.positive("num_attention_heads", num_attention_heads)
        groups = heads if num_gqa_groups is None else arguments.positive("num_gqa_groups", num_gqa_groups)
        arguments.divided("num_gqa_groups", groups, "num_attention_heads", heads)
        tp_size = (
            arguments.positive("tp_size", tp_size) if tp_group is None else torch.distributed.get_world_size(tp_group)
        )
        self.heads_per_partition = arguments.divided("tp_size", tp_size, "num_attention_heads", heads)
        self.num_gqa_groups_per_partition = arguments.divided("tp_size", tp_size, "num_gqa_groups", groups)
        if cp_group is not None:
            raise NotImplementedError("cp_group is given; allowed: None, there is no context parallelism here")
        dims = (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        if not isinstance(dims, (tuple, list)) or len(dims) != 2:
            raise wrong("kv_channels", repr(kv_channels), "an integer, or two: of query and key, of value")
        self.num_attention_heads, self.num_gqa_groups, self.tp_size = heads, groups, tp_size
        self.hidden_size_per_attention_head_k, self.hidden_size_per_attention_head_v = (
            arguments.positive("kv_channels", dim) for dim in dims
        )
        self.attention_dropout = arguments.fraction("attention_dropout", attention_dropout)
        self.qkv_format = problem.one_of("qkv_format", qkv_format, problem.QKV_FORMATS)
        if isinstance(neighborhood, Mapping):
            neighborhood = Neighborhood(**neighborhood)
        self.neighborhood = neighborhood
        if attn_mask_type is None:
            attn_mask_type = "causal" if neighborhood is None else "no_mask"
        self.attn_mask_type = problem.mask_type(attn_mask_type)
        self.window_size = problem.window(self.attn_mask_type, window_size)
        self.bottom_right_diagonal = bottom_right_diagonal
        self.layer_number = 1 if layer_number is None else arguments.positive("layer_number", layer_number)
        self.attention_type = problem.one_of("attention_type", attention_type, problem.ATTENTION_TYPES)
        self.softmax_scale = float(_arguments.scale_of(softmax_scale, dims[0]))
        self.softmax_type = problem.one_of("softmax_type", softmax_type, problem.SOFTMAX_TYPES)
        if not isinstance(softcap, (int, float)) or softcap < 0:
            raise wrong("softcap", repr(softcap), "a number >= 0, 0 for none")
        self.softcap = float(softcap)
        self.return_max_logit = bool(return_max_logit)
        self.attention_backend = problem.one_of("attention_backend", attention_backend, ("auto", *choice.NAMES))
        self.rng_states_tracker = None
        if get_rng_state_tracker is not None and not sequence_parallel:
            self.rng_states_tracker = get_rng_state_tracker()
        if self.softmax_type == "learnable":
            self.softmax_offset = nn.Parameter(torch.zeros(self.heads_per_partition))
        elif self.softmax_type == "off-by-one":
            self.register_buffer("softmax_offset", torch.zeros(self.heads_per_partition), persistent=False)
        else:
            self.softmax_offset = None

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | tuple[Tensor, Tensor] | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: Any = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: None = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        num_splits: int | None = 1,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends.

        Args:
            query_layer: `[s, b, h, d]`, `[b, s, h, d]` or `[t, h, d]`, by the format; float32, float64, bfloat16 or
                float16. Any strides will do.
            key_layer: The same with its own s or t and `num_gqa_groups` heads.
            value_layer: As `key_layer`, with the head dim of the value.
            attention_mask: Bool, True where something is masked out. With padding masks `[b, 1, 1, s]`, True where a
                token is padding, or a pair of them for queries and keys; with "arbitrary" broadcastable to
                `[b, h, sq, skv]`. Not used with other masks.
            qkv_format: In place of the layer's.
            cu_seqlens_q: Lengths of the sequences summed up, int32 `[b + 1]`, for "thd" and padding masks. Sequences
                are padded at their end.
            cu_seqlens_kv: The same of the keys; without it those of the queries, except with "thd".
            cu_seqlens_q_padded: With "thd", where each sequence starts, if there are tokens between them that belong to
                none; those have output 0. On the CPU, tokens after the last sequence are seen without it.
            cu_seqlens_kv_padded: The same of the keys.
            max_seqlen_q: With "thd", queries of the longest sequence; without it the device is asked, and waited for.
            max_seqlen_kv: The same of the keys.
            attn_mask_type: In place of the layer's.
            window_size: In place of the layer's.
            bottom_right_diagonal: In place of the layer's.
            checkpoint_core_attention: Compute the attention a second time in the backward pass and keep nothing of the
                first.
            core_attention_bias_type: "no_bias"; "pre_scale_bias", added to query times key before it is scaled;
                "post_scale_bias", added after; "alibi".
            core_attention_bias: Broadcastable to `[b, h, sq, skv]`, with "thd" of the longest sequences;
                differentiable.
            alibi_slopes: `[h]` or `[b, h]`, float32; without it the usual ones. The bias of query i and key j is
                `-slope * |i + skv - sq - j|`, without `skv - sq` where the diagonal is in the top left corner.
            fast_zero_fill: No effect.
            inference_params: None: there is no cache of keys here.
            pad_between_seqs: No effect: gaps are seen by `cu_seqlens_q_padded`.
            fp8_output: False.
            num_splits: No effect.

        Returns:
            `[s, b, h * dv]`, `[b, s, h * dv]` or `[t, h * dv]`, dv the head dim of the value; with `return_max_logit`
            also the largest score `[h]` (scaled, with bias, masked; no gradient).

        Raises:
            ValueError: An argument does not fit, or no backend is left: the message has each one's reason.
            NotImplementedError: `inference_params` or `fp8_output` is given, or a tensor is sparse or nested.
        """
        if inference_params is not None or fp8_output:
            raise NotImplementedError("inference_params and fp8_output: one is given; allowed: neither")
        call = self._call(
            query_layer=query_layer,
            key_layer=key_layer,
            value_layer=value_layer,
            attention_mask=attention_mask,
            qkv_format=qkv_format,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_kv,
            cu_seqlens_q_padded=cu_seqlens_q_padded,
            cu_seqlens_kv_padded=cu_seqlens_kv_padded,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_kv=max_seqlen_kv,
            attn_mask_type=attn_mask_type,
            window_size=window_size,
            bottom_right_diagonal=bottom_right_diagonal,
            core_attention_bias_type=core_attention_bias_type,
            core_attention_bias=core_attention_bias,
            alibi_slopes=alibi_slopes,
        )
        chosen = choice.choose(call.problem, self.attention_backend)
        if chosen.backend is None:
            raise choice.refusal(chosen)
        backend = next(b for b in BACKENDS if b.name == chosen.backend)
        if checkpoint_core_attention and call.problem.differentiable:
            # The tensors are named for their device, whose random numbers are then the same the second time.
            output, largest = torch.utils.checkpoint.checkpoint(
                *(lambda *_: backend.run(call), call.query, call.key, call.value),
                use_reentrant=False,
                context_fn=functools.partial(_random.contexts, self.rng_states_tracker),
            )
        else:
            output, largest = backend.run(call)
        if call.problem.qkv_format == "sbhd":
            output = output.transpose(0, 1)
        output = output.flatten(-2).contiguous()
        return (output, largest) if self.return_max_logit else output

    def explain(self, *arguments: Any, **named: Any) -> choice.Choice:
        """Which backend `forward` would use, and why; computes nothing.

        Args:
            arguments: As for `forward`: query, key, value and so on.
            named: The same.

        Returns:
            The choice, with what was found about each backend; printed, it is a table. Its `backend` is None when none
            is left.

        Raises:
            ValueError: An argument does not fit.
            TypeError: `forward` has no such argument.
        """
        bound = inspect.signature(self.forward).bind(*arguments, **named)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name not in _NOT_OF_THE_CALL}
        return choice.choose(self._call(**given).problem, self.attention_backend)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        dims = (self.hidden_size_per_attention_head_k, self.hidden_size_per_attention_head_v)
        text = (
            f"num_attention_heads={self.num_attention_heads}, num_gqa_groups={self.num_gqa_groups}, "
            f"kv_channels={dims}, qkv_format={self.qkv_format!r}, attn_mask_type={self.attn_mask_type!r}, "
            f"window_size={self.window_size}, attention_dropout={self.attention_dropout}, "
            f"attention_backend={self.attention_backend!r}"
        )
        return text if self.neighborhood is None else f"{text}, neighborhood={self.neighborhood}"

    def _mask(self, given_type: Any, given_window: Any, bottom_right: bool | None) -> tuple[str, tuple[int, int], bool]:
        """Mask, window and diagonal of a call: its own, or the layer's."""
        mask_type = self.attn_mask_type if given_type is None else problem.mask_type(given_type)
        if given_window is None:
            given_window = self.window_size
            if given_type is not None and given_window in ((-1, -1), (-1, 0)):
                given_window = None  # of the layer's mask: the call's brings its own
        window = problem.window(mask_type, given_window)
        if "causal" in mask_type:
            bottom_right = "bottom_right" in mask_type
        elif bottom_right is None:
            bottom_right = True if self.bottom_right_diagonal is None else self.bottom_right_diagonal
        if self.neighborhood is not None and (mask_type != "no_mask" or window != (-1, -1)):
            got = f"{mask_type!r} with window_size {window}"
            raise wrong("attn_mask_type", got, "'no_mask' without a window where neighborhood is given")
        return mask_type, window, bool(bottom_right)

    def _call(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Any,
        qkv_format: str | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_kv: Tensor | None,
        cu_seqlens_q_padded: Tensor | None,
        cu_seqlens_kv_padded: Tensor | None,
        max_seqlen_q: int | None,
        max_seqlen_kv: int | None,
        attn_mask_type: Any,
        window_size: Any,
        bottom_right_diagonal: bool | None,
        core_attention_bias_type: str,
        core_attention_bias: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> Call:
        """What a backend computes for arguments of `forward`, checked."""
        qkv_format = problem.one_of(
            "qkv_format", self.qkv_format if qkv_format is None else qkv_format, problem.QKV_FORMATS
        )
        bias_type = problem.one_of("core_attention_bias_type", core_attention_bias_type, problem.BIAS_TYPES)
        mask_type, window, bottom_right = self._mask(attn_mask_type, window_size, bottom_right_diagonal)
        if qkv_format == "thd" and "padding" not in mask_type:
            allowed = ", ".join(repr(name) for name in problem.MASK_TYPES if "padding" in name)
            raise wrong("attn_mask_type", repr(mask_type), f"{allowed} with qkv_format 'thd'")
        heads, groups = self.heads_per_partition, self.num_gqa_groups_per_partition
        dims = (self.hidden_size_per_attention_head_k, self.hidden_size_per_attention_head_v)
        tensors = arguments.heads_last(qkv_format, query_layer, key_layer, value_layer, heads, groups, dims)
        kind, device = query_layer.device.type, query_layer.device
        if _arguments.autocasting(kind):
            tensors = _arguments.autocast(kind, *tensors)
        query, key, value = tensors
        sequences = arguments.sequences(
            *(query, key, qkv_format, "padding" in mask_type, attention_mask),
            *((cu_seqlens_q, cu_seqlens_kv), (cu_seqlens_q_padded, cu_seqlens_kv_padded)),
            (max_seqlen_q, max_seqlen_kv),
        )
        batch, lengths = sequences.batch, sequences.lengths
        if self.neighborhood is not None and lengths != (self.neighborhood.tokens,) * 2:
            layout = f"the tokens of neighborhood.layout {self.neighborhood.layout}, {self.neighborhood.tokens}"
            raise wrong("the sequence lengths of query_layer and key_layer", lengths, f"{layout} of both")
        full = (batch, heads, *lengths)
        mask = arguments.pair_mask(attention_mask, device, full) if mask_type == "arbitrary" else None
        bias = arguments.additive_bias(bias_type, core_attention_bias, device, full)
        slopes = arguments.slopes_of(bias_type, alibi_slopes, device, batch, heads)
        learned = [x for x in (*tensors, bias, slopes, self.softmax_offset) if x is not None and x.requires_grad]
        asked = Problem(
            device=kind,
            architecture=torch.cuda.get_device_capability(device) if kind == "cuda" else None,
            dtype=query.dtype,
            batch=batch,
            num_heads=heads,
            num_groups=groups,
            head_dim_qk=dims[0],
            head_dim_v=dims[1],
            max_seqlen_q=lengths[0],
            max_seqlen_kv=lengths[1],
            same_lengths=sequences.same,
            qkv_format=qkv_format,
            attn_mask_type=mask_type,
            window_size=window,
            bottom_right_diagonal=bottom_right,
            bias_type=bias_type,
            bias_requires_grad=torch.is_grad_enabled() and bias is not None and bias.requires_grad,
            dropout=self.attention_dropout if self.training else 0.0,
            softcap=self.softcap,
            softmax_type=self.softmax_type,
            return_max_logit=self.return_max_logit,
            differentiable=torch.is_grad_enabled() and bool(learned),
            deterministic=choice.deterministic(),
            neighborhood=self.neighborhood,
        )
        call = Call(asked, query, key, value, self.softmax_scale, sequences, mask, bias, slopes, self.softmax_offset)
        if self.rng_states_tracker is not None:
            call.dropout_context = self.rng_states_tracker.fork
        if kind == "cuda":
            call.problem = cudnn_facts(call)
        return call

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Loads, without the state of FP8 recipes that Transformer Engine keeps under this name."""
        for name in ("_extra_state", "fused_attention._extra_state"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


#: Arguments of `forward` that no backend has to know of.
_NOT_OF_THE_CALL = (
    *("checkpoint_core_attention", "fast_zero_fill", "inference_params"),
    *("pad_between_seqs", "fp8_output", "num_splits"),
)
