"""Moments of models that were really trained: a GPT, and a model of convolutions."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from resuming.scenarios import SCENARIOS, Settings, Text
from resuming.training import Training
from torch import Tensor, nn

SETTINGS = replace(SCENARIOS["small"][1], width=128, depth=3, vocabulary=1024, schedule=1000, steps=0)
"""A vocabulary of words, so that rows of the embedding are as rare as in practice."""


class Convolutional(nn.Module):
    """An embedding, two causal convolutions, a multilayer perceptron and a head."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, vocabulary = settings.width, settings.vocabulary
        self.embedding = nn.Embedding(vocabulary, width)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 5) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).mT
        for convolution in self.convolutions:
            x = x + nn.functional.gelu(convolution(nn.functional.pad(x, (4, 0))))
        x = self.norm(x.mT)
        return self.head(x + self.perceptron(x))


class ConvolutionalText(Text):
    """A model of convolutions that predicts the next token."""

    def __init__(self, settings: Settings, seed: int) -> None:
        super().__init__(settings, seed)
        self.model = Convolutional(settings)


MODELS = {"GPT": Text, "convolutions": ConvolutionalText}


@dataclass(frozen=True)
class State:
    """The moments of a parameter as matrices: the first dimension by all others.

    Attributes:
        kind: ``matrices``, ``convolutions`` or ``embeddings`` (those of tokens and positions, and the head).
        first: ``[rows, columns]`` float32, the first moment.
        second: The second moment, alike.
    """

    kind: str
    first: Tensor
    second: Tensor


def trained(model: str, settings: Settings, beta2: float, seed: int = 0) -> Iterator[tuple[int, list[State]]]:
    """Train, and yield the states after the steps of the settings' checkpoints; tensors of 4,096 elements or more."""
    torch.manual_seed(seed)
    task = MODELS[model](settings, seed)
    training = Training(task, settings, beta2)
    named = list(task.model.named_parameters())
    names = [name for name, each in named if each.dim() > 1]  # the optimizer has these first
    done = 0
    for step in settings.checkpoints:
        training.run(done, step - done)
        done = step
        moments = training.checkpoint()["optimizer_states"][0]["state"]
        yield (
            step,
            [
                State(_kind(name, moments[index]["exp_avg"]), *(_matrix(moments[index][key]) for key in MOMENTS))
                for index, name in enumerate(names)
                if moments[index]["exp_avg"].numel() >= 4096
            ],
        )


MOMENTS = ("exp_avg", "exp_avg_sq")


def _kind(name: str, moment: Tensor) -> str:
    if moment.dim() > 2:
        return "convolutions"
    return "embeddings" if any(part in name for part in ("embed", "position", "head")) else "matrices"


def _matrix(moment: Tensor) -> Tensor:
    return moment.detach().clone().flatten(1)
