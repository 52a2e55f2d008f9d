"""Write a checkpoint on one page for the browser: a picture of its bytes, coloured by what was lost, and tables."""

import html
import os
from collections.abc import Iterator
from typing import IO

from q8lightning.checkpoint.file.write import write_durably
from q8lightning.tools.html.modules import DEPTH, Module, modules_in
from q8lightning.tools.html.picture import decibels, draw, legend
from q8lightning.tools.html.template import PAGE, SCRIPT, STYLE
from q8lightning.tools.inspection import Inspection


def write_html(found: Inspection, path: str | os.PathLike[str]) -> None:
    """Write the page of a checkpoint: one file that needs nothing else, also without a network.

    Args:
        found: What ``q8lightning.inspect`` returned.
        path: The page; what is there is replaced.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> import q8lightning
        >>> write_html(q8lightning.inspect("last.ckpt"), "report.html")  # doctest: +SKIP
    """
    page = page_of(found).encode()

    def write(file: IO[bytes]) -> None:
        file.write(page)

    write_durably(path, write)


def page_of(found: Inspection) -> str:
    """Return the page of a checkpoint."""
    root = modules_in(found)
    title = html.escape(found.path.name)
    facts = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in _facts(found))
    return PAGE.format(
        title=title,
        facts=facts,
        legend=legend(),
        treemap=draw(root),
        kinds=_kinds(found),
        modules=_table(root),
        style=STYLE,
        script=SCRIPT,
    )


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "size", f"{found.bytes:,} bytes, {found.ratio:.2f} times smaller than {found.decoded_bytes:,}"
    yield "tensors", f"{len(found.tensors):,}, {sum(each.codec is not None for each in found.tensors):,} quantized"
    for key, name in (("epoch", "epoch"), ("global_step", "step"), ("pytorch-lightning_version", "lightning")):
        if key in found.training:
            yield name, html.escape(str(found.training[key]))
    if found.update_direction_error is not None:
        yield "update direction", f"off by {found.update_direction_error:.2%}"
    for each in found.exceptions[:20]:
        yield "exception", html.escape(f"{each.name} ({each.reason})")


def _kinds(found: Inspection) -> str:
    rows = []
    for kind, size in found.sizes.items():
        lost = found.errors.get(kind, {}).get("sqnr_db")
        cells = (
            f"{size.tensors:,}",
            f"{size.bytes:,}",
            f"{size.decoded_bytes:,}",
            f"{size.ratio:.2f}x",
            decibels(lost),
        )
        rows.append(f"<tr><td>{kind}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return "".join(rows)


def _table(root: Module) -> str:
    """Return the rows of modules, down to those that have a frame."""
    return "".join(_rows(root, 0))


def _rows(module: Module, depth: int) -> Iterator[str]:
    for part in module.parts.values():
        worst = part.worst
        lost = ("", "") if worst is None else (decibels(worst.sqnr_db), html.escape(worst.name))
        ratio = f"{part.decoded_bytes / part.bytes:.2f}x" if part.bytes else ""
        count = sum(1 for _ in part.all_entries())
        cells = (f"{count:,}", f"{part.bytes:,}", f"{part.decoded_bytes:,}", ratio, *lost)
        yield (
            f'<tr><td style="padding-left:{0.5 + 1.2 * depth:.1f}em">{html.escape(part.name)}</td>'
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
        if depth + 1 < DEPTH:
            yield from _rows(part, depth + 1)
