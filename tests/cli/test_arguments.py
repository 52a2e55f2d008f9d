"""What a user gets wrong is one line on stderr and a status; nothing is written, nothing is overwritten."""

import json
import os
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support import forked
from support.files import edit_pickle, flip, place_of
from support.models import Autoencoder
from support.promises import payloads_of

import q8lightning
from q8lightning.checkpoint.policy import PRESETS
from q8lightning.cli import arguments
from q8lightning.cli import main as run_module
from q8lightning.cli.main import COMMANDS
from q8lightning.export.quantized import FORMATS

Run = Callable[..., Any]


class Unknown:
    """An object of a class that torch does not make from a file without being told to."""

    def __init__(self) -> None:
        self.lr = 0.1


@pytest.fixture
def files(plain: Path, packed: Path, tmp_path: Path) -> dict[str, Path]:
    """Files of every kind, by name; ``new`` does not exist."""
    made = {
        name: tmp_path / name
        for name in (
            "text",
            "script",
            "empty",
            "short",
            "truncated",
            "zip",
            "object",
            "foreign",
            "newer",
            "later",
            "old",
            "yaml",
        )
    }
    made["text"].write_text("epoch,loss\n1,2\n" * 100)
    made["script"].write_text("cd runs\nls\n")  # which is a pickle that asks for the class "d runs.ls"
    made["empty"].write_bytes(b"")
    made["short"].write_bytes(b"PK")
    made["truncated"].write_bytes(packed.read_bytes()[:-5000])
    with zipfile.ZipFile(made["zip"], "w") as archive:
        archive.writestr("word/document.xml", "<a/>" * 100)
    torch.save(torch.ones(3), made["object"])
    torch.save({"hyper_parameters": Unknown(), "state_dict": Autoencoder().state_dict()}, made["foreign"])
    torch.save({"q8lightning": {"format_version": 2}}, made["newer"])
    made["later"].write_bytes(packed.read_bytes())
    edit_pickle(made["later"], b"rebuild_v1", b"rebuild_v2")
    made["old"].write_bytes(b"what was there")
    made["yaml"].write_text("rules: {a: [")
    return made | {
        "plain": plain,
        "packed": packed,
        "folder": tmp_path,
        "new": tmp_path / "new",
        "nowhere": tmp_path / "no" / "new",
        "link": _link(tmp_path / "link", plain),
        "policy": _write(tmp_path / "policy", "rules: [{pattern: a, codec: mp3}]"),
        "mapping": _write(tmp_path / "mapping", "resume"),
        "missing": tmp_path / "missing",
    }


def _link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


WRONG = {
    "inspect missing": (1, "cannot open {missing}: No such file"),
    "inspect folder": (1, "{folder} is a directory; name a checkpoint file"),
    "inspect text": (1, "{text} is not a checkpoint that torch.load can read"),
    "inspect script": (1, "{script} is not a checkpoint that torch.load can read"),
    "inspect empty": (1, "the file (0 bytes are left) in {empty} is damaged"),
    "inspect short": (1, "the file (2 bytes are left) in {short} is damaged"),
    "inspect truncated": (1, "the end of the file (cut off or changed) in {truncated} is damaged"),
    "compress truncated new": (1, "the end of the file (cut off or changed) in {truncated} is damaged"),
    "decompress empty new": (1, "the file (0 bytes are left) in {empty} is damaged"),
    "compare plain truncated": (1, "the end of the file (cut off or changed) in {truncated} is damaged"),
    "inspect zip": (1, "{zip} is not a checkpoint that torch.load can read"),
    "inspect foreign": (1, "{foreign} holds an object of test_arguments.Unknown, which"),
    "inspect newer": (
        1,
        "format version 2, which this installation (format version 1) does not know; upgrade",
    ),
    "inspect plain --depth 0": (2, "--depth must be at least 1, got 0"),
    "inspect plain --depth deep": (2, "deep"),
    "inspect": (2, "required: FILE; see q8lightning inspect --help"),
    "inspect plain plain": (2, "unrecognized arguments"),
    "compress missing new": (1, "cannot open {missing}: No such file"),
    "compress object new": (1, "{object} holds Tensor, not the dict that a checkpoint is"),
    "compress plain old": (1, "{old} exists; pass --force (from Python: overwrite=True) to"),
    "compress plain plain --force": (1, "{plain} is the file that is read"),
    "compress plain link --force": (1, "{link} is the file that is read"),
    "compress plain folder --force": (1, "{folder} is a directory; name the file to write"),
    "compress plain nowhere": (1, "there is no folder"),
    "compress plain new --preset best": (2, "invalid choice: 'best'"),
    "compress plain new --preset resume --policy yaml": (2, "--preset and --policy exclude each other"),
    "compress plain new --policy yaml": (1, "{yaml} is not YAML"),
    "compress plain new --policy policy": (1, "{policy} is not a policy: rules[0]: "),
    "compress plain new --policy mapping": (1, "{mapping} is not a policy; it needs `rules`"),
    "compress plain new --policy missing": (1, "{missing}: No such file"),
    "compress plain new --keep nothing.*": (1, "'nothing.*', to be kept as it is, matches no tensor of {plain}"),
    "compress plain": (2, "required: OUT"),
    "decompress packed old": (1, "{old} exists; pass --force (from Python: overwrite=True) to"),
    "decompress packed packed": (1, "{packed} is the file that is read"),
    "decompress later new": (1, "upgrade q8lightning to load it"),
    "verify": (2, "required: FILE"),
    "verify missing": (1, "cannot open {missing}: No such file"),
    "verify text": (1, "{text} is not a checkpoint that torch.load can read"),
    "verify newer": (1, "upgrade q8lightning to load it"),
    "compare plain missing": (1, "cannot open {missing}: No such file"),
    "compare plain object": (1, "have no tensor in common"),
    "compare plain packed --plot old": (1, "{old} exists; pass --force (from Python: overwrite=True) to"),
    "compare plain packed --plot nowhere": (1, "there is no folder"),
    "compare plain packed --top 0": (2, "--top must be at least 1, got 0"),
    "destroy plain": (2, "invalid choice: 'destroy'"),
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_one_line_and_a_status(line: str, run: Run, files: dict[str, Path]) -> None:
    status, message = WRONG[line]
    before = {path: path.read_bytes() for path in files["folder"].iterdir() if path.is_file()}
    command, *arguments = line.split(" ")
    done = run(*([command] if command else []), *(files.get(argument, argument) for argument in arguments))
    assert done.status == status
    assert message.format_map(files) in done.err
    assert done.err.startswith("q8lightning: error: ")
    assert len(done.err.splitlines()) == 1, done.err
    assert command == "verify" or done.out == ""
    assert {path: path.read_bytes() for path in files["folder"].iterdir() if path.is_file()} == before


def test_a_plot_of_an_unknown_kind_is_refused(run: Run, files: dict[str, Path]) -> None:
    done = run("compare", files["plain"], files["packed"], "--plot", files["folder"] / "plot.txt")
    assert done.status == 2
    assert "Format 'txt' is not supported" in done.err
    assert len(done.err.splitlines()) == 1
    assert not (files["folder"] / "plot.txt").exists()


def test_force_overwrites(run: Run, files: dict[str, Path]) -> None:
    assert run("compress", files["plain"], files["old"], "--force").status == 0
    assert isinstance(torch.load(files["old"], weights_only=True), dict)
    assert run("decompress", files["packed"], files["old"], "--force").status == 0


def test_trust_makes_objects_of_unknown_classes(run: Run, files: dict[str, Path]) -> None:
    assert "--trust" in run("compress", files["foreign"], files["new"]).err
    assert run("compress", files["foreign"], files["new"], "--trust").status == 0
    loaded = torch.load(files["new"], weights_only=False)
    assert loaded["hyper_parameters"].lr == 0.1
    assert run("verify", files["new"], "--trust").status == 0


@pytest.fixture(scope="module", autouse=True)
def piped(plain: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the program into a reader that soon leaves; it has the time of the tests before the one that waits for it."""
    command = f"{sys.executable} -m q8lightning inspect {plain} --json | head -c 1"
    with subprocess.Popen(
        ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process


# Around the commands


def test_without_a_command_there_is_help_and_with_version_the_version(run: Run) -> None:
    assert run() == run("--help")
    assert run("--version").out == f"q8lightning {q8lightning.__version__}\n"


def test_presets_of_the_command_line_are_those_of_the_policy() -> None:
    assert tuple(PRESETS) == arguments.PRESETS
    assert arguments.FORMATS == FORMATS


def test_help_comes_without_torch(tmp_path: Path) -> None:
    """Torch takes seconds to import; a process with it would be no help at once."""
    code = """
import sys, runpy
sys.argv = ["q8lightning", "--help"]
try:
    runpy.run_module("q8lightning", run_name="__main__")
except SystemExit:
    print([name for name in ("torch", "lightning", "jsonargparse") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("[]\n"), done
    assert done.stdout.startswith("usage: q8lightning")


@pytest.mark.parametrize("width", [80, 60])
def test_short_lines_leave_columns_out_and_split_no_figure(
    width: int, run: Run, packed: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures(*command: object) -> set[str]:
        words = run(*command).out.split()
        return {word for word in words if any(map(str.isdigit, word)) and not word.startswith(("(", "/"))}

    for command in (("inspect", packed, "--depth", 1), ("compare", plain, packed, "--top", 4), ("verify", packed)):
        wide = figures(*command)
        monkeypatch.setattr(run_module, "_console", lambda: Console(width=width))
        shown = run(*command).out
        tables = shown[shown.index("kind" if command[0] != "verify" else "file ") :]
        assert all(len(line) <= width for line in tables.splitlines() if line[:1] != "└"), tables
        assert figures(*command) <= wide
        assert command[0] == "verify" or "the lines are too short" in " ".join(shown.split())
        monkeypatch.undo()
        monkeypatch.setenv("COLUMNS", "200")


def test_verify_as_json_says_what_its_lines_say(run: Run, files: dict[str, Path]) -> None:
    done = run("verify", files["packed"], files["text"], "--json")
    whole, bad = json.loads(done.out)
    assert done.status == 1
    assert (whole["file"], whole["whole"], whole["damage"]) == (str(files["packed"]), True, [])
    assert "is not a checkpoint" in bad["error"]


def test_help_names_every_command(run: Run) -> None:
    done = run("--help")
    assert done.status == 0
    assert all(f"    {name} " in done.out for name in COMMANDS)
    for name in COMMANDS:
        assert run(name, "--help").out.startswith(f"usage: q8lightning {name}")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts_know_commands_and_options(shell: str, run: Run) -> None:
    pytest.importorskip("shtab")
    done = run("--print-completion", shell)
    assert done.status == 0
    assert "q8lightning" in done.out
    assert "--preset" in done.out
    assert all(name in done.out for name in COMMANDS)


def start(folder: Path, *arguments: str, without: str | None = None) -> tuple[int | None, str]:
    """Run ``python -m q8lightning`` in a process of its own, where a module cannot be imported.

    Returns:
        The status and what is on stderr.
    """
    return forked.run(_start, folder, arguments, without), (folder / "stderr").read_text()


def _start(folder: Path, arguments: tuple[str, ...], without: str | None) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name in list(sys.modules):
        if name.startswith(("q8lightning.cli", "q8lightning.__main__")):
            del sys.modules[name]
        elif name.split(".")[0] == without:
            sys.modules[name] = None  # type: ignore[assignment]
    sys.modules.setdefault(without or "", None)  # type: ignore[arg-type]
    sys.argv[1:] = arguments
    runpy.run_module("q8lightning", run_name="__main__", alter_sys=True)


def test_what_the_program_returns_is_its_status(plain: Path, tmp_path: Path) -> None:
    message = "q8lightning: error: --depth must be at least 1, got 0; leave it out for everything\n"
    assert start(tmp_path, "inspect", str(plain), "--depth", "0") == (2, message)
    assert start(tmp_path, "inspect", str(plain)) == (0, "")


@pytest.mark.parametrize("module", ["rich"])
def test_a_missing_extra_is_one_line_with_the_remedy(module: str, tmp_path: Path) -> None:
    message = f'q8lightning: error: the command line needs {module}; pip install "q8lightning[cli]"\n'
    assert start(tmp_path, "inspect", "a.ckpt", without=module) == (2, message)


def test_without_matplotlib_everything_works_but_plots(
    run: Run, plain: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "q8lightning.cli.plot", raising=False)
    assert run("compare", plain, packed).status == 0
    done = run("compare", plain, packed, "--plot", tmp_path / "a.png")
    assert done.status == 1
    assert done.err == 'q8lightning: error: --plot needs matplotlib; pip install "q8lightning[plot]"\n'


def test_looking_at_a_file_does_not_decode_it(run: Run, packed: Path, tmp_path: Path) -> None:
    """So it works for a file whose tensors are all damaged, too."""
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(packed.read_bytes())
    for payload in payloads_of(packed).values():
        flip(damaged, place_of(damaged, payload.data))
    assert run("inspect", damaged).status == 0
    assert run("inspect", damaged, "--json").status == 0
    assert "is damaged" in run("compare", damaged, damaged).err


def test_python_dash_m_runs_it_and_a_closed_pipe_is_no_error_message(piped: subprocess.Popen[str]) -> None:
    assert piped.communicate(timeout=120) == ("{", "")
