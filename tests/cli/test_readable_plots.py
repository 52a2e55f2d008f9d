"""What is drawn can be read: no label covers another or leaves the picture, and every tensor has a place of its own."""

import random
from itertools import combinations
from typing import Any

import pytest

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg

from q8lightning.cli.plot import draw_comparison, shortened
from q8lightning.tools import Comparison, Row
from q8lightning.tools.comparison import Difference
from q8lightning.tools.tensors import BytesAParameter

KINDS = ("weights", "exp_avg", "exp_avg_sq", "update_direction")
PATH = "/home/somebody/experiments/lightning_logs/version_17/checkpoints/epoch=12-step=130000"
PROJECTION = "self_attention.query_key_value_projection.weight"
CASES: dict[str, tuple[list[str], tuple[str, ...], tuple[int, int]]] = {
    "many layers with long names": ([f"model.encoder.layers.{i}.{PROJECTION}" for i in range(150)], KINDS, (-5, -1)),
    "different beginnings": ([f"tower_{i}.{PROJECTION}.{PROJECTION}" for i in range(12)], KINDS, (-5, -1)),
    "the same beginnings and ends": ([f"{'a' * 60}.{i}.{'b' * 60}" for i in range(5)], KINDS[:1], (-3, -2)),
    "one short name": (["w"], KINDS[:1], (-3, -3)),
    "a wide range": ([f"l{i}.w" for i in range(8)], (*KINDS, "other"), (-12, 0)),
    "a narrow range": ([f"l{i}.w" for i in range(8)], KINDS, (-2, -2)),
}


def comparison(names: list[str], kinds: tuple[str, ...], decades: tuple[int, int]) -> Comparison:
    chance = random.Random(0)
    rows = [
        Row(name, f"{name}: {kind.replace('_d', ' d') if kind == KINDS[3] else kind}", kind, "float32", "linear",
            Difference(10.0 ** (2 * chance.uniform(*decades)), 1.0, 1.0))
        for name in names for kind in kinds
    ]  # fmt: skip
    nothing = BytesAParameter(0, {}, None)
    return Comparison(tuple(rows), (), (), (), nothing, nothing)


def boxes_of(figure: Any) -> dict[str, Any]:
    """Return the drawn boxes of all words of a figure."""
    FigureCanvasAgg(figure).draw()  # lays it out
    words = [figure._suptitle] if figure._suptitle else []
    for axes in figure.axes:
        words += [axes.title, axes.xaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
    shown = [word for word in words if word.get_text() and word.get_visible()]
    return {f"{word.get_text()} ({number})": word.get_window_extent() for number, word in enumerate(shown)}


@pytest.mark.parametrize("case", CASES)
def test_no_words_of_a_comparison_collide(case: str) -> None:
    names, kinds, decades = CASES[case]
    figure = draw_comparison(comparison(names, kinds, decades), f"{PATH}.q8.ckpt against {PATH}.ckpt")
    boxes = boxes_of(figure)
    assert len(boxes) > len(kinds) * 3
    for (one, first), (two, second) in combinations(boxes.items(), 2):
        assert not first.overlaps(second), f"{one} and {two}"
    for word, box in boxes.items():
        assert figure.bbox.x0 <= box.x0, word
        assert box.x1 <= figure.bbox.x1, word
        assert box.y1 <= figure.bbox.y1, word
    for axes in figure.axes:
        (line,) = axes.get_lines()
        assert sorted(line.get_ydata()) == list(range(len(names))), "a line for each layer"


@pytest.mark.parametrize("case", CASES)
def test_shortened_names_are_as_different_as_they_were(case: str) -> None:
    names = CASES[case][0]
    found = shortened(names)
    assert len(set(found)) == len(names)
    assert all(label.split("...")[0] in name for label, name in zip(found, names, strict=True))
    assert max(map(len, found)) <= 56 or case == "the same beginnings and ends"
    assert shortened([]) == []
    assert shortened(["a.b", "a.c"]) == ["a.b", "a.c"], "short ones stay"
