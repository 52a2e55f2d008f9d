"""What docs/cli.md and the README tell to type is understood, and everything that is understood is told."""

import re
import shlex
from pathlib import Path

import pytest

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
    parser = make_parser(COMMANDS)
    told = PAGE
    for command in parser._subcommands_action.choices.values():
        for action in command._actions:
            for option in action.option_strings:
                assert option in ("-h", "--help") or f"{option}" in told, option
