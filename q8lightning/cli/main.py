"""The commands: parse the arguments, call a tool, print the result; an error is one line and an exit status."""

import ctypes
import json
import os
import sys
import time
from argparse import ArgumentError, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q8lightning.cli.arguments import check_positive, chosen_policy, make_parser, parse, plotter, renames

if TYPE_CHECKING:
    from rich.console import Console

    from q8lightning.tools import Conversion, Verification

BAD_FILE = 1
"""Exit status if a file is damaged, cannot be read or written, or there is nothing to do."""

BAD_ARGUMENTS = 2
"""Exit status for arguments that make no sense."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        arguments: The arguments after the program's name; None for those of this process.
    """
    try:
        options = parse(make_parser(COMMANDS), arguments)
        import rich  # noqa: F401  # before torch, which takes longer, to say at once that it is missing

        _give_memory_back()
        return COMMANDS[options.command](options)
    except ArgumentError as error:
        return _fail(str(error), BAD_ARGUMENTS)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BAD_FILE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", BAD_FILE)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", 130)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if not _is_said_in_one_line(error):
            raise
        return _fail(str(error), BAD_FILE)


def _is_said_in_one_line(error: Exception) -> bool:
    """Whether an error is of the user's request or file, and its message says all."""
    from q8lightning.tools import CorruptCheckpointError, NewerFormatError, ToolError

    return isinstance(error, ToolError | CorruptCheckpointError | NewerFormatError)


def _fail(message: str, status: int) -> int:
    print(f"q8lightning: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _give_memory_back() -> None:
    """Let glibc return the memory of each tensor to the system.

    By default glibc returns only larger and larger blocks, up to 32 MB, once it has seen large ones freed, and keeps
    the rest. Decompressing 300 MB then grew the process by up to 200 MB; with a fixed size it grew by less than the
    largest tensor. Other C libraries have no such option.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


_M_MMAP_THRESHOLD = -3
"""The option's number in glibc's malloc.h."""


def _console() -> "Console":
    from rich.console import Console

    # Output that is not a terminal has no width, and nothing in it should be cut.
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 0)) or 120)


@contextmanager
def _progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr if that is a terminal; give the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def inspect(options: Namespace) -> int:
    """Show what a checkpoint holds: format, policy, sizes, errors and every tensor."""
    from q8lightning import tools
    from q8lightning.cli import report

    check_positive("--depth", options.depth)
    page = None if options.html is None else Path(options.html)
    if page is not None:
        tools.check_not_there(page, options.force)
    found = tools.inspect(options.file, trust=options.trust)
    if options.json:
        _print_json(found.as_primitives())
    elif page is None:
        report.print_inspection(_console(), found, options.depth)
    if page is not None:
        tools.write_html(found, page)
        if not options.json:
            print(f"{page}: open it in a browser")
    return 0


def compress(options: Namespace) -> int:
    """Write a smaller file, as the callback would have saved it."""
    from q8lightning import tools

    policy: Any = chosen_policy(options)
    begin = time.perf_counter()
    with _progress("compress") as progress:
        done = tools.compress(
            options.input,
            options.output,
            policy,
            keep=options.keep,
            overwrite=options.force,
            trust=options.trust,
            progress=progress,
        )
    _print_done(done, "quantized", time.perf_counter() - begin)
    if lost := list(_losses(done.metrics)):
        print(f"lost, as relative errors: {', '.join(lost)}")
    return 0


def decompress(options: Namespace) -> int:
    """Write a file with ordinary tensors, which loads without q8lightning."""
    from q8lightning import tools

    begin = time.perf_counter()
    with _progress("decompress") as progress:
        done = tools.decompress(
            options.input, options.output, overwrite=options.force, trust=options.trust, progress=progress
        )
    _print_done(done, "decoded", time.perf_counter() - begin)
    return 0


def export(options: Namespace) -> int:
    """Write the weights of a run with quantized weights in a format that others load."""
    from q8lightning.export.quantized import export_quantized
    from q8lightning.tools import ToolError

    if Path(options.output).exists() and not options.force:
        raise ToolError(f"{options.output} exists; pass --force to overwrite it")
    begin = time.perf_counter()
    export_quantized(
        options.input,
        options.output,
        options.format,
        not options.trust,
        prefix=options.prefix,
        rename=renames(options),
        transpose=options.transpose,
        as_floats=options.as_floats,
        dtype=options.dtype,
        config=options.config,
        round_scales=options.round_scales,
    )
    written = Path(options.output)
    files = [each for each in written.rglob("*") if each.is_file()] if written.is_dir() else [written]
    size = sum(each.stat().st_size for each in files)
    print(f"{written}: {options.format}, {size:,} bytes; {time.perf_counter() - begin:.1f} s")
    return 0


def verify(options: Namespace) -> int:
    """Compare files with their checksums and decode everything; the status is 1 if one is damaged."""
    from q8lightning import tools
    from q8lightning.cli import report

    found: dict[Path, Verification | str] = {}
    for name in options.files:
        path = Path(name)
        try:
            with _progress(path.name) as progress:
                found[path] = tools.verify(path, trust=options.trust, progress=progress)
        except (tools.ToolError, tools.NewerFormatError) as error:
            found[path] = str(error)
    if options.json:
        _print_json(
            [
                {"file": str(path), "error": result} if isinstance(result, str) else result.as_primitives()
                for path, result in found.items()
            ]
        )
    else:
        report.print_verifications(_console(), found)
    bad = 0
    for path, result in found.items():
        for what in (result,) if isinstance(result, str) else result.damage:
            text = what if isinstance(result, str) else f"{path}: {what} is damaged"
            bad = _fail(text, BAD_FILE)
    return bad


def compare(options: Namespace) -> int:
    """Show how far the tensors of B are from those of A, whichever is quantized."""
    from q8lightning import tools
    from q8lightning.cli import report

    check_positive("--top", options.top)
    if options.plot is not None:
        draw = plotter()
        tools.check_not_there(Path(options.plot), options.force)
    with _progress("compare") as progress:
        result = tools.compare(options.first, options.second, trust=options.trust, progress=progress)
    if options.json:
        _print_json({"first": options.first, "second": options.second} | result.as_primitives())
    else:
        report.print_comparison(_console(), result, options.top)
    if options.plot is not None:
        try:
            draw(result, Path(options.plot), f"{options.second} against {options.first}")
        except ValueError as error:
            raise ArgumentError(None, f"--plot {options.plot}: {error}") from error
    return 0


_WARNINGS = 5
"""How many warnings are printed; every tensor of a diverged model has one."""


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _print_done(done: "Conversion", verb: str, seconds: float) -> None:
    for warning in done.warnings[:_WARNINGS]:
        print(f"q8lightning: warning: {warning}", file=sys.stderr)
    if len(done.warnings) > _WARNINGS:
        print(f"q8lightning: warning: {len(done.warnings) - _WARNINGS} more of this kind", file=sys.stderr)
    kept = f", {done.kept} as they were" if done.kept else ""
    change = f"{done.ratio:.2f}x smaller" if done.ratio >= 1 else f"{1 / done.ratio:.2f}x larger"
    sizes = f"{done.bytes_before:,} -> {done.bytes_after:,} bytes"
    print(f"{done.path}: {done.converted} tensors {verb}{kept}; {sizes}, {change}; {seconds:.1f} s")


def _losses(metrics: Mapping[str, float]) -> Iterator[str]:
    """Yield the relative errors of each kind of tensor and of the update direction."""
    from q8lightning.tools.text import number

    for name, value in metrics.items():
        kind, _, figure = name.rpartition("/")
        if figure == "relative_error":
            yield f"{kind} {number(value)}"
        elif figure == "update_direction_error":
            yield f"update direction {number(value)}"


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "inspect": inspect,
    "compress": compress,
    "decompress": decompress,
    "export": export,
    "verify": verify,
    "compare": compare,
}
