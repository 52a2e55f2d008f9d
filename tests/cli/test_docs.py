"""What docs/cli.md and the README tell to type is understood, and everything that is understood is told."""

import argparse
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch

from q8lightning import tools
from q8lightning.cli.arguments import make_parser
from q8lightning.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "cli.md").read_text()
BLOCKS = [line for block in re.findall(r"```(?:console)?\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
README = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("q8lightning ")]
LINES = [line.removeprefix("$ ") for line in BLOCKS if re.match(r"(\$ )?q8lightning [a-z]", line)] + README


@pytest.mark.parametrize("line", LINES)
def test_every_command_that_is_shown_is_understood(line: str) -> None:
    _, *arguments = shlex.split(line, comments=True)
    options = make_parser(COMMANDS).parse_args(arguments)
    assert options.command == arguments[0]


def test_every_command_is_shown_with_its_output() -> None:
    shown = re.findall(r"```console\n\$ q8lightning (\w+) [^\n]*\n(.*?)```", PAGE, re.DOTALL)
    assert {name for name, _ in shown} == set(COMMANDS)
    assert all(len(output.strip()) > 20 for _, output in shown)
    assert (ROOT / "docs" / "cli.png").read_bytes().startswith(b"\x89PNG")


def test_every_option_is_explained_somewhere() -> None:
    told = PAGE + (ROOT / "docs" / "deploy.md").read_text()
    (commands,) = (each for each in make_parser(COMMANDS)._actions if isinstance(each, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            for option in action.option_strings:
                again = option.replace("_", "-")  # another way to write an option that is told
                assert option in ("-h", "--help") or option in told or (again != option and again in told), option


def test_the_functions_that_are_shown_run_and_are_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    weights = {f"model.{name}.weight": torch.randn(96, 64) for name in ("embed", "position")}
    moments = {index: {"exp_avg": 0.1 * x, "exp_avg_sq": x.square()} for index, x in enumerate(weights.values())}
    state = {"state": moments, "param_groups": [{"params": [0, 1]}]}
    torch.save({"state_dict": weights, "optimizer_states": [state]}, tmp_path / "plain.ckpt")
    monkeypatch.chdir(tmp_path)
    printed: list[str] = []
    exec(code, {"print": lambda *each: printed.append(" ".join(map(str, each)))})
    shown = re.findall(r"```python\n.*?```\n\n```\n(.*?)```", PAGE, re.DOTALL)[0].splitlines()
    assert len(printed) == len(shown) == 6
    assert printed[0].startswith("5 tensors, ")
    assert printed[3] == shown[3] == "True"
    functions = set(re.findall(r"^\| `(\w+)\(.*\)` \| `(\w+)` \|", PAGE, re.MULTILINE))
    assert {name for name, _ in functions} == {*COMMANDS, "save"} - {"export"}  # whose function is in docs/deploy.md
    assert all(inspect.signature(getattr(tools, name)).return_annotation.__name__ == kind for name, kind in functions)
