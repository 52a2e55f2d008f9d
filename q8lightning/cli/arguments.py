"""The arguments of the commands, and what becomes of those that are more than a word."""

import os
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import ArgumentParser, Namespace

from q8lightning.checkpoint.policy import PRESETS, CheckpointPolicy, Rule
from q8lightning.checkpoint.sections import path_of
from q8lightning.tools.compare import Comparison
from q8lightning.tools.source import CommandError, Source, leaves


def make_parser(commands: Mapping[str, Callable[[Namespace], int]]) -> ArgumentParser:
    """Return the parser; the first line of a command's docstring is its help.

    Args:
        commands: Functions by the names of the commands.
    """
    with suppress(TypeError):  # older versions have --print_shtab without being asked
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
    parser.add_argument("--preset", choices=list(PRESETS), help="the policy by its name; resume if not given")
    parser.add_argument("--policy", metavar="YAML", help="a file with the arguments of CheckpointPolicy")
    parser.add_argument(
        "--keep",
        metavar="PATTERN",
        action="append",
        default=[],
        help="store tensors whose path matches as they are, such as 'state_dict.*.table'; can be given several times",
    )


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
    "verify": _verify,
    "compare": _compare,
}


def check_positive(name: str, value: int | None) -> None:
    """Raise ArgumentError for a number below 1."""
    if value is not None and value < 1:
        raise ArgumentError(None, f"{name} must be at least 1, got {value}; leave it out for everything")


def files_of(options: Namespace) -> tuple[Path, Path]:
    """Return the files to read and to write.

    Raises:
        CommandError: If they are the same, or the second exists and may not be overwritten, or its folder does not.
    """
    source, target = Path(options.input), Path(options.output)
    if target.exists() and source.exists() and os.path.samefile(source, target):
        raise CommandError(f"{target} is the file that is read; write to another one, and move it when it is there")
    refuse_existing(target, options.force)
    return source, target


def refuse_existing(target: Path, force: bool) -> None:
    """Raise CommandError for a file that must not be overwritten, or that has no folder to be in."""
    if target.is_dir():
        raise CommandError(f"{target} is a directory; name the file to write")
    if target.exists() and not force:
        raise CommandError(f"{target} exists; pass --force to overwrite it")
    if not target.parent.is_dir():
        raise CommandError(f"there is no folder {target.parent}; make it first")


def policy_of(options: Namespace) -> CheckpointPolicy:
    """Return the policy that was asked for.

    Raises:
        ArgumentError: If both a preset and a file were given, or a pattern is to keep nothing.
        CommandError: If the file cannot be read, or is not a policy.
    """
    if options.policy is not None and options.preset is not None:
        raise ArgumentError(None, "--preset and --policy exclude each other; give one of them")
    policy = CheckpointPolicy.of(options.preset or "resume") if options.policy is None else _read(options.policy)
    return replace(policy, rules=[*(Rule(pattern) for pattern in options.keep), *policy.rules])


def _read(path: str) -> CheckpointPolicy:
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} is not YAML ({error})") from error
    if not isinstance(found, dict) or "rules" not in found:
        raise CommandError(
            f"{path} is not a policy; it needs `rules`, a list of mappings such as"
            " {pattern: state_dict.*, codec: softsign, block_size: 256}"
        )
    try:
        return CheckpointPolicy(**found)
    except (TypeError, ValueError, AttributeError) as error:
        raise CommandError(f"{path} is not a policy: {error}") from error


def check_kept(patterns: Sequence[str], source: Source) -> None:
    """Raise CommandError for a pattern that keeps nothing: it was meant to."""
    paths = [path_of(keys) for keys, _ in leaves(source.content)]
    for pattern in patterns:
        if not any(Rule(pattern).matches(path, None) for path in paths):
            raise CommandError(
                f"--keep {pattern!r} matches no tensor of {source.path}; patterns match whole paths, such as"
                f" {paths[0] if paths else 'state_dict.weight'!r}"
            )


def plotter() -> Callable[[Comparison, Path, str], None]:
    """Return the function that draws.

    Raises:
        CommandError: If matplotlib is not installed.
    """
    try:
        from q8lightning.cli.plot import plot_comparison
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        raise CommandError('--plot needs matplotlib; pip install "q8lightning[plot]"') from error
    plot: Callable[[Any, Path, str], None] = plot_comparison
    return plot
