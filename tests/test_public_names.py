"""The public names: each is there, imported when it is used, and functions for files work from the package itself."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import q8lightning
from q8lightning import ToolError


def test_every_public_name_is_listed_everywhere_and_is_there() -> None:
    tree = ast.parse(Path(q8lightning.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    for_types = [alias.name for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(for_types) == sorted(q8lightning.__all__) == sorted(q8lightning._HOMES)
    for name in q8lightning.__all__:
        assert getattr(q8lightning, name).__doc__, name
        assert name in dir(q8lightning)
    assert {name for name in dir(q8lightning) if not name.startswith("__")} == set(q8lightning.__all__)
    assert "__version__" in dir(q8lightning)
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = q8lightning.quantise  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_else_and_files_load_all_the_same(tmp_path: Path) -> None:
    """``import q8lightning`` took half a second after Lightning; torch's entry points may be switched off."""
    saved = q8lightning.save({"model": nn.Linear(64, 64)}, tmp_path / "a.ckpt")
    assert saved.tensors == 1
    code = f"""
import sys, torch
before = set(sys.modules)
import q8lightning
print(len([name for name in set(sys.modules) - before if not name.startswith("q8lightning_autoload")]))
print(torch.load({str(tmp_path / "a.ckpt")!r}, weights_only=True)["model"]["weight"].shape)
"""
    printed = {}
    for switch in ("1", "0"):
        environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": switch}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment
        )
        assert done.returncode == 0, done.stderr
        printed[switch] = done.stdout.splitlines()
    assert printed["1"] == ["1", "torch.Size([64, 64])"]
    assert printed["0"][1] == "torch.Size([64, 64])"


def test_saving_and_loading_without_a_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    saved = q8lightning.save({"model": net, "optimizer": optimizer, "step": 7}, tmp_path / "new" / "a.ckpt", "compact")
    assert saved.path.stat().st_size == saved.bytes
    assert saved.tensors == 6
    assert saved.ratio > 3
    assert saved.metrics["weights/sqnr_db"] > 40
    loaded = q8lightning.load(saved.path)
    assert loaded["step"] == 7
    net.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert q8lightning.inspect(saved.path).tensors[0].codec == "softsign/256"
    kept = q8lightning.save({"model": net, "optimizer": optimizer}, saved.path, keep=["model.*"])
    assert kept.tensors == 4
    alone = q8lightning.save(net, tmp_path / "net.pt", "compact")
    assert alone.tensors == 2
    net.load_state_dict(q8lightning.load(tmp_path / "net.pt"))
    net.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))


def test_what_functions_cannot_do_they_say(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="No such file"):
        q8lightning.load(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r'a state is a module or a mapping, got list; save it as \{"model"'):
        q8lightning.save([1, 2], tmp_path / "a.ckpt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'compakt'; did you mean 'compact'"):
        q8lightning.save({}, tmp_path / "a.ckpt", "compakt")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="nothing in it is quantized: no tensor of at least 4096 elements"):
        assert q8lightning.save(nn.Linear(4, 4), tmp_path / "a.ckpt").tensors == 0
