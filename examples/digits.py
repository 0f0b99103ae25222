"""Trains a small image classifier made of neighborhood attention on handwritten digits.

    python examples/digits.py --plot digits.png

The images are the 1797 scans of 8 x 8 pixels that scikit-learn ships (UCI, Optical Recognition of Handwritten Digits),
a fifth of them kept for testing. Every pixel is a token; each layer lets it look at its neighbors only, at a distance
(dilation) that alternates between layers. A minute or so on two CPU cores; a GPU is used when there is one.

Needs scikit-learn, tqdm and matplotlib besides vicus.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from vicus.modules import NeighborhoodAttention2D

PIXELS, CLASSES, LARGEST = 8, 10, 16.0  # of the data set: pixels are counts of ink, 0 to 16


class Layer(nn.Module):
    """Neighborhood attention and a perceptron, each on normalized input and added to it."""

    def __init__(self, width: int, heads: int, dilation: int) -> None:
        super().__init__()
        self.attention = NeighborhoodAttention2D(
            width, heads, kernel_size=3, dilation=dilation, rel_pos_bias=True, num_query_groups=heads // 2
        )
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 8, 8, width] -> the same."""
        x = x + self.attention(self.before_attention(x))
        return x + self.perceptron(self.before_perceptron(x))


class Classifier(nn.Module):
    """Pixels to tokens, layers, and a score per digit from all tokens in their places."""

    def __init__(self, width: int = 48, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, width)
        self.position = nn.Parameter(0.02 * torch.randn(PIXELS, PIXELS, width))
        self.layers = nn.Sequential(*(Layer(width, heads, dilation=1 + i % 2) for i in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Flatten(), nn.Linear(PIXELS * PIXELS * width, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 8, 8] in 0 to 1 -> scores [B, 10]."""
        tokens = self.embedding(images[..., None]) + self.position
        return self.head(self.layers(tokens))


@dataclasses.dataclass
class History:
    """One entry per epoch; accuracies are fractions of the images."""

    loss: list[float] = dataclasses.field(default_factory=list)
    train_accuracy: list[float] = dataclasses.field(default_factory=list)
    test_accuracy: list[float] = dataclasses.field(default_factory=list)


def load(seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 8, 8] in 0 to 1 and labels [N] for training, and the same for testing."""
    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=seed)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part).to(device) for part in parts)
    return train_x.float() / LARGEST, train_y.long(), test_x.float() / LARGEST, test_y.long()


def shifted(images: Tensor) -> Tensor:
    """Every image moved by up to one pixel, at random, along both axes."""
    places = F.pad(images, (1, 1, 1, 1)).unfold(1, PIXELS, 1).unfold(2, PIXELS, 1)  # [B, 3, 3, 8, 8]
    down, right = torch.randint(3, (2, len(images)), device=images.device)
    return places[torch.arange(len(images), device=images.device), down, right]


def train(epochs: int, batch: int, rate: float, seed: int, device: torch.device, quiet: bool = False) -> History:
    """Trains a new model and tests it after each epoch.

    Args:
        epochs: Passes over the training images.
        batch: Images per step.
        rate: Largest learning rate; it rises and falls over the training.
        seed: Of the split, the weights, the order of the images and their shifts.
        device: Where to compute.
        quiet: No progress bar.

    Returns:
        The course of the training.
    """
    torch.manual_seed(seed)
    train_x, train_y, test_x, test_y = load(seed, device)
    model = Classifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = len(train_x) // batch  # an incomplete batch waits for the next epoch's order
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    history = History()
    with tqdm(total=epochs * steps, unit="step", disable=quiet) as bar:
        for _ in range(epochs):
            model.train()
            losses, hits = 0.0, 0.0
            for chosen in torch.randperm(len(train_x), device=device)[: steps * batch].split(batch):
                scores = model(shifted(train_x[chosen]))
                loss = F.cross_entropy(scores, train_y[chosen], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses += loss.item()
                hits += float((scores.argmax(-1) == train_y[chosen]).float().mean())
                bar.update()
            model.eval()
            with torch.no_grad():
                right = model(test_x).argmax(-1) == test_y
            history.loss.append(losses / steps)
            history.train_accuracy.append(hits / steps)
            history.test_accuracy.append(float(right.float().mean()))
            bar.set_postfix(loss=f"{history.loss[-1]:.3f}", test=f"{history.test_accuracy[-1]:.1%}")
    return history


def plot(history: History, path: Path) -> None:
    """Draws loss and accuracies over the epochs into a file, whose ending names its format."""
    import matplotlib

    matplotlib.use("Agg")  # into a file: no display is needed
    from matplotlib import pyplot

    epochs = range(1, len(history.loss) + 1)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(epochs, history.loss)
    left.set(xlabel="epoch", ylabel="training loss")
    right.plot(epochs, [100 * x for x in history.train_accuracy], label="training images, shifted")
    right.plot(epochs, [100 * x for x in history.test_accuracy], label="test images")
    right.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 101))
    right.legend(loc="lower right")
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
    parser.add_argument("--epochs", type=positive, default=25, help="passes over the training images (default: 25)")
    parser.add_argument("--batch", type=positive, default=32, help="images per step (default: 32)")
    parser.add_argument("--rate", type=float, default=3e-3, help="largest learning rate (default: 0.003)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1, for steps this small)")
    parser.add_argument("--device", help="as PyTorch names it (default: cuda if there is one, otherwise cpu)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves into this file (.png, .pdf, .svg)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    begin = time.perf_counter()
    history = train(options.epochs, options.batch, options.rate, options.seed, device, options.quiet)
    seconds = time.perf_counter() - begin
    print(f"test accuracy {history.test_accuracy[-1]:.2%} after {options.epochs} epochs, {seconds:.0f} s on {device}")
    if options.plot is not None:
        plot(history, options.plot)
        print(f"curves in {options.plot}")
    return history


if __name__ == "__main__":
    main()
