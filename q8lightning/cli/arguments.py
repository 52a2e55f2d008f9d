"""Define the arguments of the commands, and resolve the policy and the plot among them."""

from argparse import ArgumentError
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import ArgumentParser, Namespace

from q8lightning.export.quantized import FORMATS
from q8lightning.tools import Comparison, ToolError
from q8lightning.tools.compress import PRESET_NAMES, policy_of


def make_parser(commands: Mapping[str, Callable[[Namespace], int]]) -> ArgumentParser:
    """Return the parser of the command line.

    Args:
        commands: Functions by the names of the commands. The first line of a docstring is the command's help.
    """
    with suppress(TypeError):  # older versions have --print_shtab by default
        jsonargparse.set_parsing_settings(add_print_completion_argument=True)
    parser = ArgumentParser(
        prog="q8lightning",
        description="Look into checkpoints, compress, decompress, verify and compare them.",
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, command in commands.items():
        description = (command.__doc__ or "").strip().splitlines()[0]
        own = ArgumentParser(description=description, exit_on_error=False)
        _ARGUMENTS[name](own)
        own.add_argument(
            "--trust", action="store_true", help="also make objects of unknown classes, which can run code of the file"
        )
        subcommands.add_subcommand(name, own, help=description)
    return parser


def _inspect(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the checkpoint, quantized or not")
    parser.add_argument("--depth", type=int | None, help="levels of the tree that are shown; all if not given")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _convert(parser: ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="the checkpoint to read")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")


def _compress(parser: ArgumentParser) -> None:
    _convert(parser)
    parser.add_argument("--preset", choices=list(PRESET_NAMES), help="the policy by its name; resume if not given")
    parser.add_argument("--policy", metavar="YAML", help="a file with the arguments of CheckpointPolicy")
    parser.add_argument(
        "--keep",
        metavar="PATTERN",
        action="append",
        default=[],
        help="store tensors whose path matches as they are, such as 'state_dict.*.table'; can be given several times",
    )


def _export(parser: ArgumentParser) -> None:
    parser.add_argument(
        "input", metavar="IN", help="the checkpoint of a run with quantized weights, a file or a folder"
    )
    parser.add_argument("output", metavar="OUT", help="the file to write, or the folder for formats that are folders")
    parser.add_argument("--format", choices=list(FORMATS), default="float", help="what to write")
    parser.add_argument(
        "--prefix", default="", help="write only tensors whose name begins so, without it; such as net."
    )
    several = "; can be given several times"
    parser.add_argument(
        "--rename", metavar="OLD=NEW", action="append", default=[],
        help=f"replace what matches the regular expression OLD in names{several}",
    )  # fmt: skip
    parser.add_argument(
        "--transpose", metavar="PATTERN", action="append", default=[],
        help=f"matrices that the target holds transposed, such as '*.c_attn.weight' of GPT-2{several}",
    )  # fmt: skip
    parser.add_argument(
        "--as_floats", metavar="PATTERN", action="append", default=[],
        help=f"weights that are written as floats, not as codes, such as '*.embed.weight'{several}",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="what other floats become; as they are if not given"
    )
    parser.add_argument("--config", metavar="JSON", help="the model's config.json, for formats that are folders")
    parser.add_argument(
        "--round_scales", action="store_true", help="round scales that the format cannot hold; weights change a little"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")


def _verify(parser: ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help="checkpoints, quantized or not")


def _compare(parser: ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="the checkpoint that errors are relative to, quantized or not")
    parser.add_argument("second", metavar="B", help="the other checkpoint, quantized or not")
    parser.add_argument("--top", type=int | None, help="show only so many tensors, those with the largest error")
    parser.add_argument("--plot", metavar="PNG", help="draw the error by layer and kind into this file")
    parser.add_argument("--force", action="store_true", help="overwrite the picture if it exists")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


_ARGUMENTS: dict[str, Callable[[ArgumentParser], None]] = {
    "inspect": _inspect,
    "compress": _compress,
    "decompress": _convert,
    "export": _export,
    "verify": _verify,
    "compare": _compare,
}


def renames(options: Namespace) -> dict[str, str]:
    """Return the regular expressions for names, and what replaces their matches.

    Raises:
        ArgumentError: If one is not of the form OLD=NEW.
    """
    pairs = [text.partition("=") for text in options.rename]
    for old, equals, new in pairs:
        if not old or not equals:
            given = old + equals + new
            raise ArgumentError(None, f"--rename is OLD=NEW, got {given!r}; write such as --rename '^net=model'")
    return {old: new for old, _, new in pairs}


def check_positive(name: str, value: int | None) -> None:
    """Raise ArgumentError for a number below 1."""
    if value is not None and value < 1:
        raise ArgumentError(None, f"{name} must be at least 1, got {value}; leave it out for everything")


def chosen_policy(options: Namespace) -> "str | dict[str, Any]":
    """Return the preset that was given, or the arguments of a policy from a file.

    Raises:
        ArgumentError: If both a preset and a file were given.
        ToolError: If the file is not YAML or is not a policy.
    """
    if options.policy is None:
        preset: str = options.preset or "resume"
        return preset
    if options.preset is not None:
        raise ArgumentError(None, "--preset and --policy exclude each other; give one of them")
    return _read(options.policy)


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ToolError(f"{path} is not YAML ({error})") from error
    if not isinstance(found, dict) or "rules" not in found:
        raise ToolError(
            f"{path} is not a policy; it needs `rules`, a list of mappings such as"
            " {pattern: state_dict.*, codec: softsign, block_size: 256}"
        )
    try:
        policy_of(found)
    except ValueError as error:
        raise ToolError(f"{path} is not a policy: {error}") from error
    return found


def plotter() -> Callable[[Comparison, Path, str], None]:
    """Return the function that draws the plot.

    Raises:
        ToolError: If matplotlib is not installed.
    """
    try:
        from q8lightning.cli.plot import plot_comparison
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        raise ToolError('--plot needs matplotlib; pip install "q8lightning[plot]"') from error
    plot: Callable[[Any, Path, str], None] = plot_comparison
    return plot
