"""Published models through the drop-in: DiNAT and NAT of Hugging Face transformers, random weights, against the same
models whose attention is computed by gathering windows in plain PyTorch."""

import pytest
import torch

import vicus.natten


@pytest.fixture(scope="module")
def models():
    """The two modules of transformers, imported while `natten` means vicus."""
    vicus.natten.install()
    try:
        from transformers.models.deprecated.nat import configuration_nat, modeling_nat
        from transformers.models.dinat import configuration_dinat, modeling_dinat

        yield {"dinat": (modeling_dinat, configuration_dinat), "nat": (modeling_nat, configuration_nat)}
    finally:
        vicus.natten.uninstall()


# --- The same attention in plain PyTorch, one window at a time -------------------------------------------------------


def axis_windows(length, kernel_size, dilation):
    """Keys of every token and their offsets from it, in steps of the dilation; both `[length, kernel_size]`."""
    keys, offsets = [], []
    for token in range(length):
        residue, position = token % dilation, token // dilation
        of_class = range(residue, length, dilation)
        start = min(max(position - kernel_size // 2, 0), len(of_class) - kernel_size)
        keys.append(of_class[start : start + kernel_size])
        offsets.append([p - position for p in range(start, start + kernel_size)])
    return torch.tensor([list(k) for k in keys]), torch.tensor(offsets)


def windows(height, width, kernel_size, dilation):
    """Flat keys `[height * width, kernel_size ** 2]`, and the row and column of the bias for each of them."""
    (rows, up), (columns, left) = (axis_windows(n, kernel_size, dilation) for n in (height, width))
    flat = rows[:, None, :, None] * width + columns[None, :, None, :]
    bias = [x.expand(flat.shape) + kernel_size - 1 for x in (up[:, None, :, None], left[None, :, None, :])]
    return [x.reshape(height * width, -1) for x in (flat, *bias)]


def plain_qkrpb(query, key, rpb, kernel_size, dilation):
    _, _, height, width, _ = query.shape
    keys, row, column = windows(height, width, kernel_size, dilation)
    gathered = key.flatten(2, 3)[:, :, keys]
    scores = (query.flatten(2, 3).unsqueeze(-2) * gathered).sum(-1) + rpb[:, row, column]
    return scores.unflatten(2, (height, width))


def plain_av(attn, value, kernel_size, dilation):
    _, _, height, width, _ = value.shape
    keys, _, _ = windows(height, width, kernel_size, dilation)
    gathered = value.flatten(2, 3)[:, :, keys]
    return (attn.flatten(2, 3).unsqueeze(-1) * gathered).sum(-2).unflatten(2, (height, width))


# --- Models ----------------------------------------------------------------------------------------------------------

SIZES = {
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "kernel_size": 3,
    "drop_path_rate": 0.0,
    "layer_scale_init_value": 0.5,
    "num_labels": 5,
}


def build(models, name, kind, **changes):
    modeling, configuration = models[name]
    family = name.capitalize()
    sizes = SIZES | ({"dilations": [[1, 3], [1, 2]]} if name == "dinat" else {}) | changes
    torch.manual_seed(0)
    model = getattr(modeling, family + kind)(getattr(configuration, family + "Config")(**sizes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # the biases of the windows, too, which start at zero
    return modeling, model


def run(model, pixels, **inputs):
    pixels = pixels.clone().requires_grad_()
    outputs = model(pixels, output_hidden_states=True, output_attentions=True, **inputs)
    loss = outputs.loss if "labels" in inputs else sum(x.square().mean() for x in outputs.hidden_states)
    gradients = torch.autograd.grad(loss, [pixels, *model.parameters()], allow_unused=True)
    return loss, outputs, gradients


def compare(modeling, model, monkeypatch, pixels, **inputs):
    loss, outputs, gradients = run(model, pixels, **inputs)
    monkeypatch.setattr(modeling, "natten2dqkrpb", plain_qkrpb)
    monkeypatch.setattr(modeling, "natten2dav", plain_av)
    wanted_loss, wanted_outputs, wanted = run(model, pixels, **inputs)
    torch.testing.assert_close(loss, wanted_loss)
    for field in ("hidden_states", "attentions"):
        assert len(outputs[field]) == len(wanted_outputs[field]) > 0
        for x, y in zip(outputs[field], wanted_outputs[field], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
    names = ["pixels", *(n for n, _ in model.named_parameters())]
    for n, x, y in zip(names, gradients, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, msg=lambda text, n=n: f"{n}: {text}")
    assert any("rpb" in n and x.abs().sum() > 0 for n, x in zip(names, gradients, strict=True))


@pytest.mark.parametrize("name", ["dinat", "nat"])
@pytest.mark.parametrize("training", [False, True])
def test_classifier(models, name, training, monkeypatch):
    modeling, model = build(models, name, "ForImageClassification")
    model.train(training)
    compare(modeling, model, monkeypatch, torch.randn(2, 3, 48, 56).double(), labels=torch.tensor([1, 3]))


@pytest.mark.parametrize("name", ["dinat", "nat"])
def test_backbone(models, name, monkeypatch):
    modeling, model = build(models, name, "Backbone", out_features=["stage1", "stage2"], kernel_size=5)
    compare(modeling, model, monkeypatch, torch.randn(1, 3, 44, 40).double())


@pytest.mark.parametrize("name", ["dinat", "nat"])
def test_images_smaller_than_the_window(models, name, monkeypatch):
    """The models pad the tokens; the functions refuse windows that do not fit."""
    modeling, model = build(models, name, "Model")
    compare(modeling, model, monkeypatch, torch.randn(1, 3, 16, 24).double())


def test_transformers_sees_natten(models):
    from transformers.utils import is_natten_available

    assert is_natten_available()
    for modeling, _ in models.values():
        assert modeling.natten2dav is vicus.natten.functional.natten2dav
