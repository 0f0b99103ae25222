"""Random calls of the attention layer against the oracle: formats, masks, windows, biases, groups, lengths, every
backend that takes them; values and gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_oracle import attend, pairs, slopes

from vicus.nn import DotProductAttention, attention_backends

TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-10}
CAUSAL = ("causal", "padding_causal", "causal_bottom_right", "padding_causal_bottom_right")


def to_format(sequences, length, qkv_format):
    """Sequences [S, H, D] in the memory of a format, padded with NaN; `length` is that of the batch."""
    if qkv_format == "thd":
        return torch.cat(sequences)
    padded = torch.full((len(sequences), length, *sequences[0].shape[1:]), torch.nan, dtype=sequences[0].dtype)
    for row, x in zip(padded, sequences, strict=True):
        row[: len(x)] = x
    return padded if qkv_format == "bshd" else padded.transpose(0, 1).contiguous()


def from_format(x, lengths, qkv_format):
    if qkv_format == "thd":
        return list(x.split(lengths))
    rows = x if qkv_format == "bshd" else x.transpose(0, 1)
    return [row[:n] for row, n in zip(rows, lengths, strict=True)]


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@st.composite
def calls(draw):
    mask = draw(st.sampled_from(["no_mask", "padding", *CAUSAL, "arbitrary"]))
    qkv_format = draw(st.sampled_from(["sbhd", "bshd", "thd"] if "padding" in mask else ["sbhd", "bshd"]))
    batch = draw(st.integers(1, 3))
    longest = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    lengths = [[n] * batch for n in longest]
    if "padding" in mask:
        lengths = [[draw(st.integers(0, n)) for _ in range(batch)] for n in longest]
    window = None
    if draw(st.booleans()):
        window = (draw(st.integers(0, 6)), 0 if "causal" in mask else draw(st.integers(0, 6)))
    groups = draw(st.sampled_from([1, 2, 3]))
    return {
        "mask": mask,
        "format": qkv_format,
        "batch": batch,
        "longest": longest,
        "lengths": lengths,
        "window": window,
        "bottom_right": draw(st.sampled_from([None, True, False])),
        "groups": groups,
        "heads": groups * draw(st.integers(1, 3)),
        "dims": (draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        "scale": draw(st.sampled_from([None, 0.0, 0.3, -0.7])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5])),
        "softmax": draw(st.sampled_from(["vanilla", "vanilla", "off-by-one", "learnable"])),
        "bias": draw(st.sampled_from(["no_bias", "no_bias", "pre_scale_bias", "post_scale_bias", "alibi"])),
        "bias_shape": draw(st.sampled_from(["bhss", "1hss", "b1ss", "11ss", "111s"])),
        "bias_grad": draw(st.booleans()),
        "slopes": draw(st.sampled_from([None, "h", "bh"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "by_mask": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


class Case:
    """Tensors of a drawn call, for the layer and for the oracle."""

    def __init__(self, call):
        self.call = call
        generator = torch.Generator().manual_seed(call["seed"])

        def random(*shape):
            return torch.randn(*shape, dtype=call["dtype"], generator=generator)

        batch, heads, groups, dims = call["batch"], call["heads"], call["groups"], call["dims"]
        q, kv = call["lengths"]
        if call["format"] == "thd":
            self.longest = (max(q), max(kv))
        else:
            self.longest = call["longest"]
        full = (batch, heads, *self.longest)
        self.sequences = [
            [random(n, heads, dims[0]) for n in q],
            [random(n, groups, dims[0]) for n in kv],
            [random(n, groups, dims[1]) for n in kv],
        ]
        self.mask = torch.rand(full, generator=generator) < 0.3
        shape = [full[i] if call["bias_shape"][i] != "1" else 1 for i in range(4)]
        self.bias = random(*shape).requires_grad_(call["bias_grad"])
        self.slopes = {None: None, "h": random(heads).float(), "bh": random(batch, heads).float()}[call["slopes"]]
        self.sink = random(heads)
        self.arriving = [random(n, heads * dims[1]) for n in q]

    def layer(self):
        call = self.call
        layer = DotProductAttention(
            *(call["heads"], call["dims"] if call["dims"][0] != call["dims"][1] else call["dims"][0], call["groups"]),
            qkv_format=call["format"],
            attn_mask_type=call["mask"],
            window_size=call["window"],
            bottom_right_diagonal=call["bottom_right"],
            softmax_scale=call["scale"],
            softmax_type=call["softmax"],
            softcap=call["softcap"],
            return_max_logit=True,
        ).to(call["dtype"])
        if call["softmax"] == "learnable":
            layer.softmax_offset.data = self.sink.clone()
        return layer

    def arguments(self):
        call, given = self.call, {}
        q, kv = call["lengths"]
        if "padding" in call["mask"]:
            if call["format"] == "thd" or not call["by_mask"]:
                given |= {"cu_seqlens_q": cumulative(q), "cu_seqlens_kv": cumulative(kv)}
            else:
                given["attention_mask"] = tuple(
                    (torch.arange(n) >= torch.tensor(lengths)[:, None])[:, None, None]
                    for n, lengths in zip(self.longest, (q, kv), strict=True)
                )
        elif call["mask"] == "arbitrary":
            given["attention_mask"] = self.mask
        if call["bias"] == "alibi":
            given["alibi_slopes"] = self.slopes
        elif call["bias"] != "no_bias":
            given["core_attention_bias"] = self.bias
        return given | {"core_attention_bias_type": call["bias"]}

    def expected(self):
        """Output of each sequence, largest scores, and gradients of sequences, bias and sink."""
        call = self.call
        heads, batch = call["heads"], call["batch"]
        twins = [[x.double().clone().requires_grad_() for x in one] for one in self.sequences]
        bias = self.bias.detach().double().clone().requires_grad_()
        whole_bias = bias.expand(batch, heads, *self.longest)
        sink = {"vanilla": None, "off-by-one": torch.zeros(heads).double(), "learnable": self.sink.double().clone()}
        sink = sink[call["softmax"]]
        if sink is not None:
            sink.requires_grad_()
        causal = "causal" in call["mask"]
        bottom_right = "bottom_right" in call["mask"] if causal else call["bottom_right"] is not False
        outputs, largest = [], []
        for b, (q, k, v) in enumerate(zip(*twins, strict=True)):
            sizes = len(q), len(k)
            seen = pairs(*sizes, causal, call["window"] or (-1, -1), bottom_right)
            if call["mask"] == "arbitrary":
                seen = seen & ~self.mask[b]
            alibi = torch.tensor(slopes(heads)).double()
            if self.slopes is not None:
                alibi = self.slopes.double() if self.slopes.dim() == 1 else self.slopes[b].double()
            here = whole_bias[b, :, : sizes[0], : sizes[1]]
            output, most = attend(
                *(q, k, v),
                scale=call["dims"][0] ** -0.5 if call["scale"] is None else call["scale"],
                seen=seen,
                softcap=call["softcap"],
                pre_bias=here if call["bias"] == "pre_scale_bias" else None,
                bias=here if call["bias"] == "post_scale_bias" else None,
                alibi=alibi if call["bias"] == "alibi" else None,
                bottom_right=bottom_right,
                sink=sink,
            )
            outputs.append(output.flatten(1))
            largest.append(most)
        leaves = [x for one in twins for x in one] + [bias] + ([] if sink is None else [sink])
        arriving = [x.double() for x in self.arriving]
        gradients = torch.autograd.grad(outputs, leaves, arriving, allow_unused=True, materialize_grads=True)
        count = 3 * batch
        return outputs, torch.stack(largest).amax(0), gradients[:count], gradients[count], gradients[count + 1 :]


def close(got, want, dtype, what, times=1):
    tolerance = TOLERANCE[dtype] * times
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance, msg=lambda m: f"{what}: {m}")


@settings(max_examples=250)
@given(calls())
def test_layer_against_the_oracle(call):
    case = Case(call)
    layer, given_ = case.layer(), case.arguments()
    outputs, largest, gradients, of_bias, of_sink = case.expected()
    dtype, qkv_format, (q, kv) = call["dtype"], call["format"], call["lengths"]
    for name, more in (("unfused", True), ("unfused", False), ("flash", False)):
        layer.return_max_logit = more  # asked for, it leaves only one backend
        tensors = [
            to_format(x, n, qkv_format).requires_grad_()
            for x, n in zip(case.sequences, (case.longest[0], case.longest[1], case.longest[1]), strict=True)
        ]
        if name == "flash" and layer.explain(*tensors, **given_).reasons["flash"]:
            continue
        with attention_backends(flash=name == "flash", unfused=name == "unfused"):
            got = layer(*tensors, **given_)
        if more:
            got, most = got
            close(most, largest, dtype, f"{name}, max_logit")
        shape = {"sbhd": (case.longest[0], call["batch"]), "bshd": (call["batch"], case.longest[0]), "thd": (sum(q),)}
        assert got.shape == (*shape[qkv_format], call["heads"] * call["dims"][1])
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert not got.isnan().any()
        for part, want in zip(from_format(got, q, qkv_format), outputs, strict=True):
            close(part, want, dtype, f"{name}, output")
        arriving = torch.nan_to_num(to_format(case.arriving, case.longest[0], qkv_format), 1e9)
        leaves = [*tensors]
        leaves += (
            [case.bias]
            if case.bias.requires_grad and call["bias"].endswith("bias") and call["bias"] != "no_bias"
            else []
        )
        leaves += [layer.softmax_offset] if call["softmax"] == "learnable" else []
        parts = list(torch.autograd.grad(got, leaves, arriving, allow_unused=True, materialize_grads=True))
        for i, (gradient, lengths) in enumerate(zip(parts[:3], (q, kv, kv), strict=True)):
            assert not gradient.isnan().any()
            for part, want in zip(
                from_format(gradient, lengths, qkv_format), gradients[i * len(q) : (i + 1) * len(q)], strict=True
            ):
                close(part, want, dtype, f"{name}, gradient of {'qkv'[i]}", 10)
        del parts[:3]
        if parts and len(leaves) > 3 and leaves[3] is case.bias:
            close(parts.pop(0), of_bias, dtype, f"{name}, gradient of the bias", 10)
        if parts:
            close(parts[0], of_sink[0], dtype, f"{name}, gradient of the sink", 10)
