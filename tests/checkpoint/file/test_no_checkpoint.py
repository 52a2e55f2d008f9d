"""``load`` and ``inspect`` say of a file that is no checkpoint the same, and no more than helps."""

from pathlib import Path

import pytest
import torch
from support.files import flip, place_of
from support.promises import payloads_of

import q8lightning
from q8lightning import CorruptCheckpointError, ToolError

FILES = {"a script": b"import torch\n\nprint(torch)\n", "a page": b"<!DOCTYPE html><html></html>\n" * 99}
HINT = "without_verification"


@pytest.mark.parametrize("content", FILES)
def test_a_file_that_is_no_checkpoint_is_called_that(content: str, tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_bytes(FILES[content])
    said = []
    for tool in (q8lightning.inspect, q8lightning.load):
        with pytest.raises(ToolError) as error:
            tool(path)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert said[0].startswith(f"{path} is not a checkpoint that torch.load can read")
    assert HINT not in said[0]


def test_a_hint_stands_only_where_it_helps(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    q8lightning.save({"state_dict": {"w": torch.randn(64, 64), "b": torch.ones(9)}}, path)
    whole = path.read_bytes()
    flip(path, place_of(path, payloads_of(path)["state_dict.w"].data), bit=2)
    with pytest.raises(CorruptCheckpointError, match=rf"the tensor .*{HINT}"):
        q8lightning.load(path)
    with q8lightning.without_verification():
        assert torch.equal(torch.load(path)["state_dict"]["b"], torch.ones(9))
    path.write_bytes(whole[:-300])
    with pytest.raises(CorruptCheckpointError, match=r"verify` says which files are whole$"):
        q8lightning.load(path)
