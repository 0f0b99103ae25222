"""Which backend computes a call: environment, blocks, preference, explanations. No GPU is needed: the device is part of
the question."""

import dataclasses
import itertools
import logging
import threading

import pytest
import torch
from usual_problems import CPU, HOPPER

import vicus
from vicus.nn import DotProductAttention, Neighborhood, attention_backends, choice, preference
from vicus.nn.backends import BACKENDS

NAMES = ("flash", "fused", "unfused")
AMPERE = dataclasses.replace(HOPPER, architecture=(8, 0))


def tensors(length=6, heads=4, groups=2, dim=8, **options):
    return [torch.randn(length, 2, n, dim, **options) for n in (heads, groups, groups)]


# --- What is permitted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["NVTE_", "VICUS_"])
@pytest.mark.parametrize("values", list(itertools.product([None, "", "0", "1"], repeat=3)))
def test_every_environment(prefix, values, monkeypatch):
    monkeypatch.setenv("VICUS_ATTN_PREFERENCE", "te")  # an order that no measurement changes
    for name, value in zip(NAMES, values, strict=True):
        if value is not None:
            monkeypatch.setenv(f"{prefix}{name.upper()}_ATTN", value)
    permitted = [name for name, value in zip(NAMES, values, strict=True) if value != "0"]
    found = choice.choose(HOPPER)
    expected = [name for name in ("fused", "flash", "unfused") if name in permitted]
    assert [v.backend for v in found.verdicts if not v.reason] == expected
    assert found.backend == (expected[0] if expected else None)
    for name in set(NAMES) - set(permitted):
        assert found.reasons[name] == f"forbidden by {prefix}{name.upper()}_ATTN=0"
    layer, qkv = DotProductAttention(4, 8, 2), tensors()
    on_cpu = [name for name in permitted if name != "fused"]
    if on_cpu:
        assert layer.explain(*qkv).backend == on_cpu[0]
        assert layer(*qkv).shape == (6, 2, 32)
    else:
        with pytest.raises(ValueError) as raised:
            layer(*qkv)
        for name in NAMES:
            assert f"\n  {name}: " in str(raised.value)
        assert f"forbidden by {prefix}FLASH_ATTN=0" in str(raised.value)


def test_own_variables_go_first(monkeypatch):
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    monkeypatch.setenv("VICUS_FLASH_ATTN", "1")
    assert choice.choose(CPU).backend == "flash"
    monkeypatch.setenv("VICUS_FLASH_ATTN", "0")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "1")
    assert choice.choose(CPU).reasons["flash"] == "forbidden by VICUS_FLASH_ATTN=0"


def test_environment_is_read_at_every_choice(monkeypatch):
    layer, qkv = DotProductAttention(4, 8, 2), tensors()
    seen = []
    for value in ("1", "0", "1"):
        monkeypatch.setenv("NVTE_FLASH_ATTN", value)
        seen.append(layer.explain(*qkv).backend)
    assert seen == ["flash", "unfused", "flash"]


def test_permitting_forces_nothing(monkeypatch):
    monkeypatch.setenv("NVTE_FUSED_ATTN", "1")
    with attention_backends(fused=True):
        assert choice.choose(CPU).backend == "flash"
        assert choice.choose(HOPPER).reasons["flash"] == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("NVTE_FLASH_ATTN", "yes"), ("VICUS_UNFUSED_ATTN", "2"), ("VICUS_ATTN_PREFERENCE", "fast"), ("NVTE_DEBUG", "on")],
)
def test_a_wrong_variable_is_named(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("NVTE_DEBUG_LEVEL", "2")
    with pytest.raises(ValueError, match=f"{name} is '{value}'; allowed: '"):
        choice.choose(CPU)


@pytest.mark.parametrize("permitted", list(itertools.product([None, False, True], repeat=3)))
def test_every_block(permitted, monkeypatch):
    monkeypatch.setenv("VICUS_ATTN_PREFERENCE", "te")
    with attention_backends(**dict(zip(NAMES, permitted, strict=True))):
        found = choice.choose(HOPPER)
    for name, value in zip(NAMES, permitted, strict=True):
        assert found.reasons[name] == (f"forbidden by attention_backends({name}=False)" if value is False else "")
    assert choice.choose(HOPPER).backend == "fused"


def test_blocks_nest_and_go_before_the_environment(monkeypatch):
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    with attention_backends(flash=False, fused=True):
        assert choice.choose(HOPPER).backend == "fused"
        with attention_backends(fused=False):
            assert choice.choose(HOPPER).backend == "unfused"
            with attention_backends(flash=True):
                assert choice.choose(HOPPER).backend == "flash"
        assert choice.choose(HOPPER).backend == "fused"
    assert choice.choose(HOPPER).reasons == {"flash": "", "unfused": "", "fused": "forbidden by NVTE_FUSED_ATTN=0"}


def test_a_block_ends_with_an_error_and_belongs_to_its_thread():
    with pytest.raises(KeyError), attention_backends(flash=False):
        raise KeyError
    assert choice.choose(CPU).backend == "flash"
    seen = []
    with attention_backends(flash=False):
        thread = threading.Thread(target=lambda: seen.append(choice.choose(CPU).backend))
        thread.start()
        thread.join()
        assert choice.choose(CPU).backend == "unfused"
    assert seen == ["flash"]


def test_a_block_takes_bools_alone():
    with pytest.raises(ValueError, match="fused is 1; allowed: True, False, None"), attention_backends(fused=1):
        pass


def test_the_layer_may_name_the_only_backend():
    qkv = tensors()
    layer = DotProductAttention(4, 8, 2, attention_backend="unfused")
    assert layer.explain(*qkv).backend == "unfused"
    assert layer.explain(*qkv).reasons["flash"] == "attention_backend is 'unfused'"
    with pytest.raises(ValueError, match="fused: the tensors are on 'cpu'; cuDNN computes on 'cuda'"):
        DotProductAttention(4, 8, 2, attention_backend="fused")(*qkv)


# --- What is preferred -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_rule_of_transformer_engine(architecture, monkeypatch):
    monkeypatch.setenv("VICUS_ATTN_PREFERENCE", "te")
    found = choice.choose(dataclasses.replace(HOPPER, architecture=architecture))
    assert found.backend == ("fused" if architecture >= (9, 0) else "flash")
    assert [v.backend for v in found.verdicts][-1] == "unfused"
    assert "VICUS_ATTN_PREFERENCE=te" in found.verdicts[0].preference
    with attention_backends(flash=False, fused=False):
        assert choice.choose(HOPPER).backend == "unfused"


TABLE = {
    "how": "by dice",
    "sources": {},
    "rows": [
        {
            "architecture": architecture,
            "pass": passed,
            "mask": mask,
            "head_dim": dim,
            "tokens": n,
            "tflops": t,
            "source": "dice",
        }
        for architecture, passed, mask, dim, n, t in [
            ("sm90", "forward", "full", 64, 1024, {"flash": 3, "fused": 2}),
            ("sm90", "forward", "full", 128, 1024, {"flash": 2, "fused": 3}),
            ("sm90", "forward", "full", 128, 16384, {"flash": 2, "unfused": 9}),
            ("sm90", "forward", "window", 64, 1024, {"fused": 1, "flash": 7, "unfused": 8}),
            ("sm90", "training", "causal", 64, 1024, {"unfused": 2, "fused": 1}),
        ]
    ],
}


@pytest.mark.parametrize(
    ("change", "order"),
    [
        ({"head_dim_qk": 64, "attn_mask_type": "no_mask"}, ["flash", "fused", "unfused"]),
        ({"head_dim_qk": 72, "attn_mask_type": "no_mask"}, ["flash", "fused", "unfused"]),
        ({"head_dim_qk": 128, "attn_mask_type": "no_mask"}, ["fused", "flash", "unfused"]),
        ({"attn_mask_type": "causal"}, ["fused", "flash", "unfused"]),  # as "full": there is no row of causal masks
        (
            {"attn_mask_type": "no_mask", "max_seqlen_q": 9000, "max_seqlen_kv": 9000},
            ["unfused", "flash", "fused"],
        ),  # the longer row is nearer
        ({"attn_mask_type": "no_mask", "window_size": (100, 100)}, ["unfused", "flash", "fused"]),
        ({"neighborhood": Neighborhood((1024,), 7)}, ["unfused", "flash", "fused"]),  # as a window
        ({"differentiable": True}, ["unfused", "fused", "flash"]),  # not measured comes last
        ({"architecture": (10, 0)}, ["fused", "flash", "unfused"]),  # no row of this one: the rule
        ({"architecture": (8, 9)}, ["flash", "fused", "unfused"]),
    ],
)
def test_table_of_figures(change, order, monkeypatch):
    monkeypatch.setattr(preference, "table", lambda: TABLE)
    asked = dataclasses.replace(HOPPER, **{"max_seqlen_q": 1024, "max_seqlen_kv": 1024} | change)
    ranks = preference.rank(asked, NAMES, te=False)
    assert [name for name, _ in ranks] == order
    assert [name for name, _ in preference.rank(asked, ["flash"], te=False)] == ["flash"]


def test_figures_are_quoted_with_their_source(monkeypatch):
    monkeypatch.setattr(preference, "table", lambda: TABLE)
    found = choice.choose(dataclasses.replace(HOPPER, max_seqlen_q=16384, max_seqlen_kv=16384))
    assert found.backend == "unfused"
    assert found.verdicts[0].preference == "9 TFLOP/s (full, head dim 128, 16384 tokens, forward, dice)"
    assert found.verdicts[2].preference.startswith("not measured (full")


def test_the_table_that_is_checked_in():
    table = preference.table()
    assert table["how"]
    for row in table["rows"]:
        assert row.keys() == {"architecture", "pass", "mask", "head_dim", "tokens", "tflops", "source"}
        assert row["source"] in table["sources"]
        assert row["pass"] in ("forward", "training")
        assert row["mask"] in ("full", "causal", "window", "neighborhood")
        assert row["tflops"].keys() <= set(NAMES)
        assert all(figure > 0 for figure in row["tflops"].values())
    keys = [tuple(row[k] for k in ("architecture", "pass", "mask", "head_dim", "tokens")) for row in table["rows"]]
    assert len(set(keys)) == len(keys)
    assert {row["architecture"] for row in table["rows"]} >= {"cpu", "sm90"}
    for source in table["sources"].values():
        assert source.keys() >= {"machine", "date", "how"}


def test_what_is_preferred_on_hopper_and_on_cpus():
    # Of dense attention cuDNN and the engines take turns; windows are the engines' own.
    for training in (False, True):
        hopper = dataclasses.replace(HOPPER, differentiable=training)
        assert choice.choose(hopper).backend in ("flash", "fused")
        assert choice.choose(dataclasses.replace(hopper, window_size=(512, 0))).backend == "flash"
        assert choice.choose(dataclasses.replace(hopper, neighborhood=Neighborhood((64, 128), 7))).backend == "flash"
    assert choice.choose(AMPERE).backend == "flash"
    for training, mask in itertools.product((False, True), ("causal", "no_mask")):
        assert choice.choose(dataclasses.replace(CPU, differentiable=training, attn_mask_type=mask)).backend == "flash"


# --- Determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["NVTE_", "VICUS_"])
def test_deterministic_by_environment(prefix, monkeypatch):
    assert not choice.deterministic()
    monkeypatch.setenv(f"{prefix}ALLOW_NONDETERMINISTIC_ALGO", "1")
    assert not choice.deterministic()
    monkeypatch.setenv(f"{prefix}ALLOW_NONDETERMINISTIC_ALGO", "0")
    assert choice.deterministic()
    layer, qkv = DotProductAttention(4, 8, 2), tensors()
    assert "deterministic True" in str(layer.explain(*qkv))
    assert layer.explain(*qkv).backend == "flash"


def test_deterministic_by_switches():
    with vicus.use_deterministic_algorithms(True):
        assert choice.deterministic()
    torch.use_deterministic_algorithms(True)
    try:
        assert choice.deterministic()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not choice.deterministic()


@pytest.mark.parametrize("name", ["flash", "unfused"])
def test_deterministic_gradients(name, monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    layer = DotProductAttention(4, 8, 2, attention_backend=name)
    torch.manual_seed(0)
    qkv = tensors(300, requires_grad=True)
    first, second = (torch.autograd.grad(layer(*qkv).square().sum(), qkv) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- What is said about it -------------------------------------------------------------------------------------------


def test_explanation_is_a_table():
    found = DotProductAttention(4, 8, 2).explain(*tensors(), attn_mask_type="no_mask", window_size=(2, 2))
    assert found.backend == "flash"
    assert [v.backend for v in found.verdicts] == ["flash", "unfused", "fused"]
    assert [v.chosen for v in found.verdicts] == [True, False, False]
    head, *lines = str(found).splitlines()
    assert "cpu, float32, sbhd, batch 2, tokens 6/6, heads 4/2, head dim 8, mask no_mask, window_size (2, 2)" in head
    assert [line.split()[:2] for line in lines] == [["flash", "chosen"], ["unfused", "possible"], ["fused", "dropped"]]
    assert lines[2].endswith("the tensors are on 'cpu'; cuDNN computes on 'cuda'")


def test_explanation_takes_what_forward_takes():
    layer = DotProductAttention(4, 8, 2)
    assert layer.explain(*tensors(), checkpoint_core_attention=True, num_splits=4).backend == "flash"
    with pytest.raises(TypeError, match="colour"):
        layer.explain(*tensors(), colour="red")


def test_python_logging(caplog):
    layer, qkv = DotProductAttention(4, 8, 2), tensors()
    with caplog.at_level(logging.INFO, "vicus.nn"):
        layer(*qkv)
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, "vicus.nn"):
        layer(*qkv)
    said = [record.getMessage() for record in caplog.records]
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert said[0].startswith("attention of cpu, float32")
    assert any(text.startswith("attention backend flash chosen: ") for text in said)
    assert any(text.startswith("attention backend unfused possible, not preferred: ") for text in said)
    assert "attention backend fused dropped: the tensors are on 'cpu'; cuDNN computes on 'cuda'" in said


@pytest.mark.parametrize(
    ("debug", "level", "lines"),
    [(None, "2", 0), ("0", "2", 0), ("1", None, 0), ("1", "0", 0), ("1", "1", 1), ("1", "2", 4)],
)
def test_debug_variables(debug, level, lines, monkeypatch, capfd):
    for name, value in (("NVTE_DEBUG", debug), ("NVTE_DEBUG_LEVEL", level)):
        if value is not None:
            monkeypatch.setenv(name, value)
    DotProductAttention(4, 8, 2)(*tensors())
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == lines
    assert ("backend flash chosen" in err) == (lines > 0)
    assert ("backend fused dropped" in err) == (lines > 1)


def test_names_of_backends():
    assert tuple(backend.name for backend in BACKENDS) == NAMES
