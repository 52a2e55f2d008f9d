"""Check what `make package` has built, and try the wheel where nothing else is installed.

python .ci/check_package.py dist torch==2.13.0
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("q8lightning/", "q8lightning_autoload/")
URLS = {"Repository", "Documentation", "Changelog", "Issues"}


def tracked() -> set[str]:
    """Return the files of the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


def check_sdist(path: Path) -> None:
    """The source distribution has every file of the repository."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    require(not (missing := tracked() - names), f"{path.name} lacks {sorted(missing)}; see MANIFEST.in")


def check_wheel(path: Path) -> None:
    """The wheel has the packages, whole, and nothing beside them and its metadata."""
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        inside = {name.rpartition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = message_from_bytes(archive.read(inside["METADATA"]))
        entries = archive.read(inside["entry_points.txt"]).decode()
    expected = {name for name in tracked() if name.startswith(PACKAGES)}
    require(names == expected, f"{path.name} differs from the repository in {sorted(names ^ expected)}")
    require("q8lightning/py.typed" in names, f"{path.name} has no py.typed, so that type checkers ignore its types")
    require("licenses/LICENSE" in inside, f"{path.name} has no license")
    for line in ("q8lightning = q8lightning.__main__:run", "q8lightning = q8lightning_autoload:register"):
        require(line in entries, f"{path.name} has no entry point {line}")
    check_metadata(metadata)


def check_metadata(metadata: Message) -> None:
    """What PyPI shows: addresses, versions of Python, and a README whose links work there."""
    urls = {value.partition(",")[0] for value in metadata.get_all("Project-URL", [])}
    require(urls >= URLS, f"project.urls lacks {sorted(URLS - urls)}")
    require(metadata["Requires-Python"] is not None, "requires-python is not set")
    named = "Programming Language :: Python :: 3."
    versions = [each for each in metadata.get_all("Classifier", []) if each.startswith(named)]
    require(bool(versions), "no classifier says on which versions of Python the tests ran")
    text = re.sub(r"```.*?```", "", str(metadata.get_payload()), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    relative = [link for link in links if not link.startswith(("https://", "#"))]
    require(not relative, f"links of the README that lead nowhere on PyPI: {relative}")


def try_in_clean_environment(wheel: Path, torch: str) -> None:
    """Install the wheel without extras, and do there what the README says."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "env", with_pip=True)
        python = Path(folder) / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"

        def run(*arguments: str) -> str:
            done = subprocess.run([python, *arguments], cwd=folder, capture_output=True, text=True, check=False)
            require(done.returncode == 0, f"python {' '.join(arguments)}:\n{done.stdout}\n{done.stderr}")
            return done.stdout

        run("-m", "pip", "install", "--quiet", "--no-compile", torch, str(wheel.resolve()))
        run("-m", "pip", "check")
        where = run("-I", "-c", "import q8lightning; print(q8lightning.__file__)").strip()
        require(Path(folder).resolve() in Path(where).resolve().parents, f"q8lightning came from {where}")
        # A process that never imports the package reads its files: torch calls the entry point.
        print(run("-I", str(ROOT / "tests" / "support" / "pages.py"), str(ROOT / "README.md")).splitlines()[-1])
        saved = "max(__import__('pathlib').Path().rglob('*.ckpt'), key=lambda path: path.stat().st_mtime)"
        load = f"import sys, torch; x = torch.load({saved}, weights_only=True)['q8lightning']"
        print(run("-I", "-c", f"{load}; print('loaded, format', x['format_version'])").strip())


def require(holds: bool, message: str) -> None:
    if not holds:
        sys.exit(f"check_package: {message}")


def main(dist: str, torch: str) -> None:
    (sdist,), (wheel,) = Path(dist).glob("*.tar.gz"), Path(dist).glob("*.whl")
    check_sdist(sdist)
    check_wheel(wheel)
    print(f"{sdist.name} and {wheel.name} are complete")
    try_in_clean_environment(wheel, torch)


if __name__ == "__main__":
    main(*sys.argv[1:])
