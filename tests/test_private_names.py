"""What the package relies on inside torch and Lightning is there, is listed, and is missed with a clear message.

The list is ``q8lightning/system/private_names.py``. This file holds it against the versions that are installed, and
against the package: what is listed is used, and no private name of another package is used that is not listed.
"""

import ast
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from support.models import Autoencoder, quiet_trainer
from support.packages import PACKAGES, package

import q8lightning
from q8lightning import QuantizationCallback, QuantizedCheckpointIO
from q8lightning.system.find_names import is_declared
from q8lightning.system.private_names import PRIVATE_NAMES, MissingNameError, PrivateName, is_there, owners, resolve
from q8lightning.trainer.lightning_api.internals import logged_steps

PACKAGE = Path(q8lightning.__file__).parent
LIST = PACKAGE / "system" / "private_names.py"
SOURCES = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "q8lightning_autoload").rglob("*.py")]
OTHERS = ("torch", "lightning", "torchmetrics", "triton", "pytorch_lightning", "lightning_fabric")
PRIVATE = re.compile(r"_[A-Za-z]\w+")


@cache
def parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_text())


def assigned(tree: ast.Module) -> set[str]:
    """Return what a module defines or sets on ``self``: functions, classes, variables, attributes, slots."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
        elif isinstance(node, ast.Assign) and "__slots__" in map(ast.unparse, node.targets):
            names |= {each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)}
    return names


def mentioned(tree: ast.Module) -> Iterator[str]:
    """Yield attributes, texts, and the parts of dotted names of other packages, in texts and in imports."""
    pieces = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        dotted: list[str] = []
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in pieces:
            yield node.value
            dotted = [node.value]
        elif isinstance(node, ast.ImportFrom):
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        for name in dotted:
            if name.split(".")[0] in OTHERS:
                yield from name.split(".")


def inherited(tree: ast.Module) -> set[str]:
    """Return what is assigned in the modules of the package from which a module imports something."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("q8lightning."):
            folder = PACKAGE.parent.joinpath(*node.module.split("."))
            imported = (folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names))
            names = names.union(*(assigned(parsed(each)) for each in imported if each.is_file()))
    return names


def unlisted(tree: ast.Module) -> set[str]:
    """Return the private names of other packages that a module uses although they are not listed."""
    listed = {each.name for each in PRIVATE_NAMES} | {part for each in PRIVATE_NAMES for part in each.owner.split(".")}
    return {name for name in mentioned(tree) if PRIVATE.fullmatch(name)} - assigned(tree) - inherited(tree) - listed


@pytest.mark.parametrize("private", PRIVATE_NAMES, ids=lambda each: f"{each.owner}.{each.name}")
def test_the_installed_versions_have_every_name(private: PrivateName) -> None:
    for name in PACKAGES:
        package(name)  # names of Lightning are looked for in both packages
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}"
    assert is_there(private), f"{private} has gone from {versions}: say in its row what replaced it"


def test_a_setup_never_stops_because_of_what_only_code_tells() -> None:
    """``torch.compile``, for one, puts a function of its own in the place of ``Module.__init__``."""
    for private in PRIVATE_NAMES:
        if private.without is None and private.part != "tools":
            assert all(is_declared(owner, private.name) for owner in owners(private.owner)), private


@pytest.mark.parametrize("private", PRIVATE_NAMES, ids=lambda each: f"{each.owner}.{each.name}")
def test_every_name_is_used(private: PrivateName) -> None:
    sources = [source for source in SOURCES if source != LIST]
    assert any(private.name in mentioned(parsed(source)) for source in sources)


@pytest.mark.parametrize("source", [each for each in SOURCES if each != LIST], ids=lambda each: each.name)
def test_no_private_name_is_used_that_is_not_listed(source: Path) -> None:
    assert not unlisted(parsed(source)), "add a row to q8lightning/system/private_names.py, or do without"


@pytest.mark.parametrize(
    "code",
    [
        "from lightning.pytorch.loops import _hidden",
        "import torch._hidden",
        "from torch._hidden.eval_frame import callback",
        "def f(trainer):\n    return trainer._hidden",
        "def f(tensor):\n    return getattr(tensor, '_hidden', None)",
        "def f(modules):\n    return 'torch._hidden.utils' in modules",
        "def f(plugin):\n    plugin._hidden = None",
        "class A(Base):\n    def f(self):\n        return self._hidden",
    ],
)
def test_the_search_finds_private_names(code: str) -> None:
    assert unlisted(ast.parse(code)) == {"_hidden"}


def test_the_search_leaves_the_packages_own_names_alone() -> None:
    own = "class A:\n    __slots__ = ('_c',)\n    def f(self):\n        self._a = self._b()\n    def _b(self): ..."
    assert not unlisted(ast.parse(f"{own}\ndef g(a):\n    return a._a, a._b, a._c, a.__dict__"))


def set_up(folder: Path, package_name: str = PACKAGES[0], **options: Any) -> Any:
    """Train for a step with a callback in a real Trainer, and save."""
    models = package(package_name).models
    trainer = models.quiet_trainer(
        folder, max_steps=1, limit_val_batches=0, callbacks=[QuantizationCallback(**options)]
    )
    trainer.fit(models.Autoencoder())
    trainer.save_checkpoint(folder / "saved.ckpt")
    return trainer


@pytest.mark.parametrize("package_name", PACKAGES)
@pytest.mark.filterwarnings("error:.*relies on")
def test_nothing_is_said_where_all_names_are_there(package_name: str, tmp_path: Path) -> None:
    set_up(tmp_path, package_name, qat={}, async_save=True)


def test_what_can_be_done_without_is_said_once_at_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.serialization._get_storage_alignment")
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[QuantizationCallback()])
    with pytest.warns(UserWarning, match="relies on") as said:
        trainer.fit(Autoencoder())
    (message,) = (str(each.message) for each in said if "relies on" in str(each.message))
    assert "torch.serialization._get_storage_alignment (where records begin; without it, torch.save writes" in message
    assert torch.__version__ in message


_save = torch.serialization._save


def with_one_more(
    obj: Any, zip_file: Any, pickle_module: Any, pickle_protocol: Any, _disable: Any, new: Any = 0
) -> None:
    _save(obj, zip_file, pickle_module, pickle_protocol, _disable)


@pytest.mark.parametrize(
    "other",
    [
        lambda *args: _save(*args),
        with_one_more,
        lambda obj, zip_file, module, protocol, flag: _save(obj, zip_file, module, protocol, flag),
    ],
    ids=["of any parameters", "with one more", "with other names"],
)
def test_a_torch_that_saves_otherwise_is_said_once_at_setup_and_saves(
    other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.serialization._save", other)
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[QuantizationCallback()])
    before = []
    model = Autoencoder()
    model.on_train_start = lambda: before.extend(str(each.message) for each in said)  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(model)
        for name in "ab":
            trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    (message,) = (str(each.message) for each in said if "serialization" in str(each.message))
    assert message in before, "before training begins"
    assert (
        "torch.serialization._save(obj, zip_file, pickle_module, pickle_protocol, _disable_byteorder_record)" in message
    )
    assert "without it, torch.save writes the files, more slowly and larger" in message
    saved = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert saved["q8lightning"]["tensors"]
    assert saved["state_dict"].keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("gone", "options"),
    [
        ("torch._foreach_copy_", {}),
        ("torchmetrics.Metric._wrap_update", {}),
        ("torch.utils._python_dispatch._disable_current_modes", {"qat": {}}),
        ("lightning.pytorch.plugins.precision.Precision.predict_step_context", {"qat": {}}),
    ],
)
def test_what_cannot_be_done_without_stops_the_setup(
    gone: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(gone)
    trained: list[int] = []
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[QuantizationCallback(**options)])
    model = Autoencoder()
    model.on_train_start = lambda: trained.append(1)  # type: ignore[method-assign]
    with pytest.raises(MissingNameError, match=re.escape(gone)) as error:
        trainer.fit(model)
    assert not trained
    assert torch.__version__ in str(error.value)
    assert "Install versions that have them" in str(error.value)


def test_who_does_not_ask_for_qat_needs_none_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("lightning.pytorch.plugins.precision.Precision.predict_step_context")
    set_up(tmp_path)


def test_the_plugin_by_itself_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._foreach_copy_")
    with pytest.raises(MissingNameError, match=r"torch\._foreach_copy_"):
        QuantizedCheckpointIO()


def test_a_name_that_is_gone_is_named_where_it_is_used() -> None:
    with pytest.raises(MissingNameError, match=r"torch\.overrides\._never_there does not exist"):
        resolve("torch.overrides", "_never_there")


def test_steps_are_counted_otherwise_where_lightnings_counter_is_missing(tmp_path: Path) -> None:
    trainer = set_up(tmp_path)
    assert logged_steps(trainer) == 1
    del trainer.fit_loop.epoch_loop._batches_that_stepped
    assert logged_steps(trainer) == trainer.global_step == 1
