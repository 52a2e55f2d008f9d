"""Draw what the demo measured: the bytes of one state, and the loss after a resume from each file."""

from pathlib import Path

from matplotlib import pyplot as plt

COLORS = {"weights": "#4c72b0", "exp_avg": "#dd8452", "exp_avg_sq": "#55a868", "everything else": "#8c8c8c"}


def draw(path: Path, sizes: dict[str, dict[str, int]], losses: dict[str, list[float]], gaps: dict[str, float]) -> None:
    """Write a picture of two panels.

    Args:
        path: The file to write, a PNG or SVG.
        sizes: For each way to save, the bytes of each kind of tensor and of the ``whole file``.
        losses: For each way, the loss of every step after the resume.
        gaps: For each way but ``plain``, how far its losses are from those of ``plain`` (RMS).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), width_ratios=(1.15, 1), layout="constrained")
    plain = sizes["plain"]["whole file"]
    for row, (name, parts) in enumerate(sizes.items()):
        start = 0.0
        for kind, color in COLORS.items():
            left.barh(row, parts[kind] / 1e6, left=start, color=color, label=None if row else kind, height=0.7)
            start += parts[kind] / 1e6
        smaller = "" if name == "plain" else f", {plain / parts['whole file']:.1f} times smaller"
        left.text(start + plain / 1e8, row, f"{parts['whole file'] / 1e6:.1f} MB{smaller}", va="center")
    left.set_yticks(range(len(sizes)), list(sizes))
    left.invert_yaxis()
    left.set_xlim(0, plain / 1e6 * 1.18)
    left.set_xlabel("one checkpoint, MB")
    left.legend(loc="lower right", frameon=False)

    for number, (name, values) in enumerate(losses.items()):
        steps = range(1, len(values) + 1)
        if name == "plain":
            right.plot(steps, values, linewidth=5, color="#c8c8c8", label=name)
        else:  # dashes in turns, so that every line is seen where all lie on one another
            dashes = (6 * number, (6, 6 * (len(losses) - 2)))
            right.plot(steps, values, linewidth=1.6, linestyle=dashes, label=f"{name}: off by {gaps[name]:.0e}")
    low, high = right.get_ylim()
    right.set_ylim(low, high + 0.25 * (high - low))
    right.set_xlabel("steps after the resume")
    right.set_ylabel("training loss")
    right.legend(loc="upper center", ncols=2, frameon=False, handlelength=2.4, columnspacing=1.2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)
