"""Trains a small language model with grouped-query attention, character by character, on the manual that Python ships.

    python examples/characters.py --plot characters.png

The text are the topics of `help()` (pydoc_data/topics.py, half a million characters), a tenth of them kept for testing.
Eight query heads share two heads of keys and values; positions are rotary embeddings. Two minutes on two CPU cores; a
GPU is used when there is one.

Needs tqdm and matplotlib besides vicus.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vicus.nn import RotaryEmbedding, SelfAttention, TransformerConfig


class Layer(nn.Module):
    """Attention and a perceptron, each on normalized input and added to it."""

    def __init__(self, config: TransformerConfig, number: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = SelfAttention(config, number)  # causal
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """[s, b, width] -> the same."""
        output, bias = self.attention(self.before_attention(x), rotary_pos_emb=angles)
        x = x + output + bias
        return x + self.perceptron(self.before_perceptron(x))


class Model(nn.Module):
    """Characters to scores of the next character."""

    def __init__(self, config: TransformerConfig, alphabet: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, config.hidden_size)
        self.rotary = RotaryEmbedding(config.kv_channels)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(1, config.num_layers + 1))
        self.norm = nn.LayerNorm(config.hidden_size)
        nn.init.normal_(self.embedding.weight, std=config.init_method_std)

    def forward(self, characters: Tensor) -> Tensor:
        """Characters [s, b] -> scores [s, b, alphabet]."""
        x = self.embedding(characters)
        angles = self.rotary(len(characters), device=x.device)
        for layer in self.layers:
            x = layer(x, angles)
        return F.linear(self.norm(x), self.embedding.weight)


@dataclasses.dataclass
class Text:
    """Characters as numbers: `alphabet` [A], and the two parts of the text, int64."""

    alphabet: str
    train: Tensor
    test: Tensor

    @classmethod
    def load(cls) -> "Text":
        """The manual that this Python ships."""
        from pydoc_data.topics import topics

        # Characters outside of ASCII are rare, and differ from one version of Python to the next.
        text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode()
        alphabet = "".join(sorted(set(text)))
        numbers = torch.tensor([alphabet.index(character) for character in text])
        cut = len(numbers) * 9 // 10
        return cls(alphabet, numbers[:cut], numbers[cut:])


@dataclasses.dataclass
class History:
    """One entry per evaluation; losses are bits per character."""

    step: list[int] = dataclasses.field(default_factory=list)
    train: list[float] = dataclasses.field(default_factory=list)
    test: list[float] = dataclasses.field(default_factory=list)


def bits(model: Model, characters: Tensor) -> Tensor:
    """Mean loss of the characters [s + 1, b] after the first, in bits per character."""
    scores = model(characters[:-1])
    return F.cross_entropy(scores.flatten(0, 1), characters[1:].flatten()) / math.log(2)


@torch.no_grad()
def test(model: Model, text: Tensor, context: int, device: torch.device) -> float:
    """Loss on the first sixteen thousand characters of the test text, each in a sequence of `context`."""
    count = min(len(text) - 1, 1 << 14) // context
    sequences = torch.stack([text[i * context : (i + 1) * context + 1] for i in range(count)], 1).to(device)
    return sum(float(bits(model, part)) * part.shape[1] for part in sequences.split(32, 1)) / count


def train(model: Model, text: Text, options: argparse.Namespace, device: torch.device) -> History:
    """Trains the model; tests it ten times on the way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.steps, pct_start=0.1)
    history, losses = History(), []
    every = max(options.steps // 10, 1)
    places = torch.arange(options.context + 1)[:, None]
    with tqdm(total=options.steps, unit="step", disable=options.quiet) as bar:
        for step in range(1, options.steps + 1):
            starts = torch.randint(len(text.train) - options.context, (options.batch,))
            loss = bits(model, text.train[places + starts].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
            if step % every == 0 or step == options.steps:
                history.step.append(step)
                history.train.append(sum(losses) / len(losses))
                history.test.append(test(model, text.test, options.context, device))
                losses.clear()
                bar.set_postfix(train=f"{history.train[-1]:.2f}", test=f"{history.test[-1]:.2f}")
    return history


@torch.no_grad()
def write(model: Model, text: Text, length: int, context: int, device: torch.device) -> str:
    """Text that the model makes up, character by character, from a line break on."""
    written = [text.alphabet.index("\n")]
    for _ in range(length):
        scores = model(torch.tensor(written[-context:], device=device)[:, None])[-1, 0]
        written.append(int(torch.multinomial((scores / 0.8).softmax(-1), 1)))
    return "".join(text.alphabet[number] for number in written[1:])


def plot(history: History, path: Path) -> None:
    """Draws the losses over the steps into a file, whose ending names its format."""
    import matplotlib

    matplotlib.use("Agg")  # into a file: no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(history.step, history.train, marker=".", label="training text, mean since the point before")
    axes.plot(history.step, history.test, marker=".", label="test text")
    axes.set(title="Next character of Python's manual", xlabel="step", ylabel="bits per character", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; it must be at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> History:
    """Reads the command line, trains, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=1000, help="of training (default: 1000)")
    parser.add_argument("--batch", type=positive, default=16, help="sequences per step (default: 16)")
    parser.add_argument("--context", type=positive, default=128, help="characters per sequence (default: 128)")
    parser.add_argument("--width", type=positive, default=128, help="features of a character (default: 128)")
    parser.add_argument("--layers", type=positive, default=4, help="of the model (default: 4)")
    parser.add_argument("--heads", type=positive, default=8, help="query heads (default: 8)")
    parser.add_argument("--groups", type=positive, default=2, help="key/value heads, a divisor of heads (default: 2)")
    parser.add_argument("--rate", type=float, default=3e-3, help="largest learning rate (default: 0.003)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--device", help="as PyTorch names it (default: cuda if there is one, otherwise cpu)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses into this file (.png, .pdf, .svg)")
    parser.add_argument("--write", type=int, default=300, help="characters to make up at the end (default: 300)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        config = TransformerConfig(
            hidden_size=options.width,
            num_attention_heads=options.heads,
            num_query_groups=options.groups,
            num_layers=options.layers,
            attention_dropout=0.0,
        )
    except ValueError as error:
        parser.error(str(error))
    text = Text.load()
    model = Model(config, len(text.alphabet)).to(device)
    begin = time.perf_counter()
    history = train(model, text, options, device)
    seconds = time.perf_counter() - begin
    print(
        f"test loss {history.test[-1]:.3f} bits per character after {options.steps} steps, {seconds:.0f} s on {device}"
    )
    if options.write > 0:
        print(write(model, text, options.write, options.context, device))
    if options.plot is not None:
        plot(history, options.plot)
        print(f"curve in {options.plot}")
    return history


if __name__ == "__main__":
    main()
