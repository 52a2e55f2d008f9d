"""Define the arguments of the commands, and resolve the policy and the plot among them.

Nothing here imports torch before a command runs, so that help comes at once.
"""

import argparse
import sys
from argparse import ArgumentError, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from q8lightning.tools import Comparison

PRESETS = ("resume", "compact", "precise")
"""The names of the presets; a test compares them with those of the policy."""

FORMATS = ("float", "codes", "safetensors", "gguf", "bitsandbytes", "compressed-tensors", "torchao")
"""The formats of exports; a test compares them with those that there are."""

SHELLS = ("bash", "zsh", "tcsh")
"""The shells that shtab writes completion scripts for."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that each becomes one line."""

    def error(self, message: str) -> NoReturn:
        hint = "" if " --help" in message else f"; see {self.prog} --help"  # a command's parser was there before
        raise ArgumentError(None, message + hint)


class _PrintVersion(argparse.Action):
    """Print the version of the installed package, and end."""

    def __call__(self, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"q8lightning {version('q8lightning')}")
        sys.exit(0)


class _PrintCompletion(argparse.Action):
    """Print the completion script for a shell, and end."""

    def __call__(self, parser: argparse.ArgumentParser, *others: Any) -> NoReturn:
        try:
            import shtab
        except ModuleNotFoundError:
            raise ArgumentError(None, '--print-completion needs shtab; pip install "q8lightning[cli]"') from None
        shell = others[1]
        print(shtab.complete(parser, shell))
        sys.exit(0)


def make_parser(commands: Mapping[str, Callable[[Namespace], int]]) -> Parser:
    """Return the parser of the command line.

    Args:
        commands: Functions by the names of the commands. The first line of a docstring is the command's help.
    """
    parser = Parser(
        prog="q8lightning",
        description="Look into checkpoints, compress, decompress, verify and compare them.",
        epilog="q8lightning COMMAND --help says more about a command, docs/cli.md about all of them.",
    )
    parser.add_argument("--version", nargs=0, action=_PrintVersion, help="print the version and end")
    parser.add_argument(
        "--print-completion", choices=SHELLS, action=_PrintCompletion, help="print a completion script for a shell"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in commands.items():
        description = (command.__doc__ or "").strip().splitlines()[0]
        own = subparsers.add_parser(name, help=description, description=description)
        _ARGUMENTS[name](own)
        own.add_argument(
            "--trust", action="store_true", help="also make objects of unknown classes, which can run code of the file"
        )
    return parser


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a checkpoint or a folder with shards, quantized or not")
    parser.add_argument("--depth", metavar="N", type=int, help="show N levels of the tree instead of all")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--html", metavar="PAGE", help="draw bytes and errors by module on a page for the browser")
    parser.add_argument("--force", action="store_true", help="overwrite PAGE if it exists")


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="the checkpoint or folder to read")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")


def _pattern(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError(
            "a pattern is empty, which matches nothing; write such as 'state_dict.*.table'"
        )
    return text


def _compress(parser: argparse.ArgumentParser) -> None:
    _convert(parser)
    parser.add_argument(
        "--preset", choices=PRESETS, metavar="NAME", help=f"{', '.join(PRESETS[:-1])} or {PRESETS[-1]}; else resume"
    )
    parser.add_argument("--policy", metavar="YAML", help="a file with rules of your own instead of a preset")
    parser.add_argument(
        "--keep",
        metavar="PATTERN",
        type=_pattern,
        action="append",
        default=[],
        help="leave tensors with such paths as they are, for instance 'state_dict.*.table'; can be given several times",
    )


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", metavar="IN", help="the checkpoint of a run with quantized weights, a file or a folder"
    )
    parser.add_argument("output", metavar="OUT", help="the file to write, or the folder for formats that are folders")
    parser.add_argument("--format", choices=FORMATS, default="float", help="what to write")
    parser.add_argument(
        "--prefix", default="", help="write only tensors whose name begins so, without it; such as net."
    )
    several = "; can be given several times"
    parser.add_argument(
        "--rename", metavar="OLD=NEW", action="append", default=[],
        help=f"replace what matches the regular expression OLD in names{several}",
    )  # fmt: skip
    parser.add_argument(
        "--transpose", metavar="PATTERN", type=_pattern, action="append", default=[],
        help=f"matrices that the target holds transposed, such as '*.c_attn.weight' of GPT-2{several}",
    )  # fmt: skip
    parser.add_argument(
        "--as-floats", "--as_floats", metavar="PATTERN", type=_pattern, action="append", default=[],
        help=f"weights that are written as floats, not as codes, such as '*.embed.weight'{several}",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="what other floats become; as they are if not given"
    )
    parser.add_argument("--config", metavar="JSON", help="the model's config.json, for formats that are folders")
    parser.add_argument(
        "--round-scales",
        "--round_scales",
        action="store_true",
        help="round scales that the format cannot hold; weights change a little",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help="checkpoints or folders, quantized or not")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="the checkpoint that errors are relative to, quantized or not")
    parser.add_argument("second", metavar="B", help="the other checkpoint, quantized or not")
    parser.add_argument("--top", metavar="N", type=int, help="show only the N tensors with the largest errors")
    parser.add_argument("--plot", metavar="PNG", help="draw the error by layer and kind into this file")
    parser.add_argument("--force", action="store_true", help="overwrite PNG if it exists")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


_ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
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
    import yaml

    from q8lightning.tools import ToolError
    from q8lightning.tools.convert.compress import policy_of

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


def plotter() -> "Callable[[Comparison, Path, str], None]":
    """Return the function that draws the plot.

    Raises:
        ToolError: If matplotlib is not installed.
    """
    from q8lightning.tools import ToolError

    try:
        from q8lightning.cli.plot import plot_comparison
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        raise ToolError('--plot needs matplotlib; pip install "q8lightning[plot]"') from error
    plot: Callable[[Any, Path, str], None] = plot_comparison
    return plot


def parse(parser: Parser, arguments: Sequence[str] | None) -> Namespace:
    """Parse arguments; without a command, print the help and end."""
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        sys.exit(0)
    return options
