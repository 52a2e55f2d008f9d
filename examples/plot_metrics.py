"""Train a small network and measure, as it goes, what checkpoints of it would lose; draws docs/metrics_sqnr.png.

    python examples/plot_metrics.py [OUT.png]        # a few seconds on a CPU; needs matplotlib

Each codec encodes the state after every 50 steps, as the presets do: weights, and Adam's two moments.
"""

import sys
from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from q8lightning.metrics import ReconstructionSQNR, UpdateDirectionError
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec

CODECS = {
    "weights, linear + residual": get_codec("linear", 256, residual_bits=8),
    "weights, softsign": get_codec("softsign", 256),
    "exp_avg, softsign": get_codec("softsign", 128),
    "exp_avg_sq, log": get_codec("log", 128),
}
EVERY, SAVES = 50, 8


def train() -> Sequence[dict[str, list[Tensor]]]:
    """Fit a random teacher; return weights and moments of all matrices after every 50 steps."""
    torch.manual_seed(0)
    teacher, model = (nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    states = []
    for step in range(1, EVERY * SAVES + 1):
        x = torch.randn(128, 64)
        loss = (model(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
            moments = {key: [optimizer.state[p][key].clone() for p in matrices] for key in ("exp_avg", "exp_avg_sq")}
            states.append({"weights": [p.detach().clone() for p in matrices], **moments})
    return states


def decoded(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), x.dtype)


def main(path: str = "docs/metrics_sqnr.png") -> None:
    states = train()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))

    for name, codec in CODECS.items():
        metric, values = ReconstructionSQNR(), []
        for state in states:
            metric.reset()
            for x in state[name.split(",")[0]]:
                metric.update_from_statistics(codec.encode_and_measure(x)[1])  # nothing is decoded
            values.append(metric.compute())
        metric.plot(values, ax=left)
        left.get_lines()[-1].set_label(name)
        print(f"{name:28}", " ".join(f"{float(value):6.2f}" for value in values), "dB")
    left.set(ylabel="ReconstructionSQNR, dB")

    direction, values = UpdateDirectionError(eps=1e-8), []
    for state in states:
        direction.reset()
        for m, v in zip(state["exp_avg"], state["exp_avg_sq"], strict=True):
            direction.update(m, v, decoded(CODECS["exp_avg, softsign"], m), decoded(CODECS["exp_avg_sq, log"], v))
        values.append(direction.compute())
    direction.plot(values, ax=right)
    print(f"{'update direction':28}", " ".join(f"{float(value):6.2%}" for value in values))

    for axes in (left, right):
        axes.set_xticks(range(SAVES), [EVERY * (save + 1) for save in range(SAVES)])
    left.set_ylim(30, 110)
    right.set_ylim(-0.001, 0.0075)  # room for the first point and for the words at zero
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
