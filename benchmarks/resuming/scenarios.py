"""The trainings that are resumed: a large GPT and a vision transformer, and small ones that a CPU trains in seconds."""

import pydoc_data.topics
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from char_lm import GPT


class Task(Protocol):
    """A model, and the loss of each batch."""

    model: nn.Module

    def loss(self, step: int) -> Tensor:
        """Return the loss of the batch of a step, the same batch whenever it is asked for."""


@dataclass(frozen=True)
class Settings:
    """A scenario's size; every field is a flag of the script.

    Attributes:
        device: Where it trains.
        mixed: Whether forward and backward run under autocast in bfloat16. Weights and moments are float32 always.
        width: Width of the activations.
        depth: Number of blocks.
        heads: Attention heads of each block.
        vocabulary: Number of tokens; up to 256 are bytes, others also the most frequent words.
        batch: Sequences or images in a batch.
        context: Tokens of a sequence.
        learning_rate: Peak of the cosine schedule.
        warmup: Steps until the peak.
        schedule: Steps until the schedule has reached a tenth of the peak.
        checkpoints: The steps after which the state is kept: early, in the middle and late.
        steps: Steps after each resume.
    """

    device: str
    mixed: bool
    width: int
    depth: int
    heads: int
    vocabulary: int
    batch: int
    context: int
    learning_rate: float
    warmup: int
    schedule: int
    checkpoints: tuple[int, ...]
    steps: int

    @property
    def last(self) -> int:
        """The number of batches that are needed."""
        return max(self.checkpoints) + self.steps


class Text:
    """A GPT that predicts the next token of Python's documentation and standard library."""

    def __init__(self, settings: Settings, seed: int) -> None:
        s, device = settings, torch.device(settings.device)
        self.model = GPT(s.vocabulary, s.context, s.width, s.depth, s.heads)
        _initialize(self.model, s.depth)
        self.model.to(device)
        self._tokens = tokenize(s.vocabulary).to(device)
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self._tokens) - s.context, (s.last, s.batch, 1), generator=generator)
        self._starts, self._offsets = starts.to(device), torch.arange(s.context + 1, device=device)

    def loss(self, step: int) -> Tensor:
        """Return the cross entropy of a batch of sequences."""
        window = self._tokens[self._starts[step] + self._offsets].long()
        logits = self.model(window[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def _initialize(model: nn.Module, depth: int) -> None:
    """Initialize as GPT-2: normal values, smaller where a block adds to its input."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            adds = name.endswith(("project.weight", "feed_forward.2.weight"))
            nn.init.normal_(weight, std=0.02 / (2 * depth) ** 0.5 if adds else 0.02)


def tokenize(vocabulary: int) -> Tensor:
    """Return the text as tokens, ``[tokens]`` int32.

    Up to 256 tokens are the bytes of the documentation alone. Of a larger vocabulary, the rest are the most frequent
    words of the documentation and the standard library; a word that is not among them is spelled in bytes. So rows of
    the embedding are as rare as in practice.
    """
    text = "\n".join(pydoc_data.topics.topics.values())
    if vocabulary <= 256:
        return torch.frombuffer(bytearray(text.encode("ascii", errors="replace")), dtype=torch.uint8).int()
    words = re.findall(r" ?\w+|\s+|[^\w\s]", "\n".join([text, *_library()]))
    common = Counter(words).most_common(vocabulary - 256)
    known = {word: [256 + number] for number, (word, _) in enumerate(common)}
    return torch.tensor([token for word in words for token in known.get(word) or word.encode()], dtype=torch.int32)


def _library() -> list[str]:
    """Return the sources of the standard library without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = sorted(path for path in folder.rglob("*.py") if left_out.isdisjoint(path.relative_to(folder).parts))
    return [path.read_text(errors="replace") for path in paths]


class Digits:
    """A vision transformer of timm, or else of transformers, that learns scikit-learn's handwritten digits.

    Labels are smoothed and images noisy, so that the loss stays far from zero.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        s, self._device = settings, torch.device(settings.device)
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise SystemExit("the scenario vit reads scikit-learn's digits; pip install scikit-learn") from None
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        self._images, self._labels = images.to(self._device), torch.tensor(digits.target).to(self._device)
        self.model = _vision_transformer(s).to(self._device)
        generator = torch.Generator().manual_seed(seed)
        self._chosen = torch.randint(len(images), (s.last, s.batch), generator=generator).to(self._device)
        self._noise, self._seed = torch.Generator(self._device), seed

    def loss(self, step: int) -> Tensor:
        """Return the cross entropy of a batch of images."""
        images, labels = self._images[self._chosen[step]], self._labels[self._chosen[step]]
        self._noise.manual_seed(self._seed * 1_000_000 + step)
        noise = torch.randn(images.shape, generator=self._noise, device=self._device)
        logits = self.model(images + 0.5 * noise)
        logits = getattr(logits, "logits", logits)
        return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)


def _vision_transformer(s: Settings) -> nn.Module:
    """Return a transformer over patches of two by two pixels, with random weights."""
    size = {"embed_dim": s.width, "depth": s.depth, "num_heads": s.heads}
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        try:
            from transformers import ViTConfig, ViTForImageClassification
        except ImportError:
            raise SystemExit("the scenario vit needs a vision transformer; pip install timm") from None
        names = {"hidden_size": s.width, "num_hidden_layers": s.depth, "num_attention_heads": s.heads}
        images = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = ViTConfig(**names, **images, **dropout, intermediate_size=4 * s.width)
        model: nn.Module = ViTForImageClassification(config)
        return model
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, **size)
    return model


_GPU, _CPU = {"device": "cuda:0", "mixed": True}, {"device": "cpu", "mixed": False}

SCENARIOS: dict[str, tuple[Callable[[Settings, int], Task], Settings]] = {
    "gpt": (  # GPT-2's width and depth: 110 million parameters
        Text,
        Settings(
            **_GPU, width=768, depth=12, heads=12, vocabulary=32_768, batch=8, context=256,
            learning_rate=6e-4, warmup=50, schedule=800, checkpoints=(100, 300, 600), steps=100,
        ),
    ),
    "vit": (  # timm's vit_small: 21 million parameters
        Digits,
        Settings(
            **_GPU, width=384, depth=12, heads=6, vocabulary=0, batch=128, context=0,
            learning_rate=5e-4, warmup=50, schedule=800, checkpoints=(100, 300, 600), steps=100,
        ),
    ),
    "small": (  # 240 thousand parameters
        Text,
        Settings(
            **_CPU, width=96, depth=2, heads=4, vocabulary=128, batch=8, context=64,
            learning_rate=2e-3, warmup=20, schedule=600, checkpoints=(100, 200, 400), steps=100,
        ),
    ),
    "small_vit": (  # 599 thousand parameters
        Digits,
        Settings(
            **_CPU, width=128, depth=3, heads=4, vocabulary=0, batch=32, context=0,
            learning_rate=5e-4, warmup=20, schedule=600, checkpoints=(100, 200, 400), steps=100,
        ),
    ),
}  # fmt: skip
"""Each scenario: what makes its task of settings and a seed, and its settings."""
