"""Tensors that share memory, lie oddly in it, or are no weights: each comes back as what it was."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.plugins import MixedPrecision, TorchCheckpointIO
from support.models import Autoencoder, Shrink, quiet_trainer, train_and_save
from support.odd_checkpoints import ODD
from support.promises import (
    WEIGHTS,
    assert_kept,
    assert_same,
    load,
    payloads_of,
    promised_paths,
    same_bits,
    same_memory,
    stored,
)
from torch import Tensor, nn

from q8lightning import (
    CheckpointPolicy,
    QuantizationCallback,
    QuantizedCheckpointIO,
    QuantizedTensor,
    Rule,
    keep_encoded,
)
from q8lightning.quantization.codecs.table import get_codec


def save_both(
    module: pl.LightningModule, preset: str | CheckpointPolicy, folder: Path, weights_only: bool = False, **options: Any
) -> tuple[Path, dict[str, Any]]:
    """Train two steps, save the state quantized and plain; return the quantized file and the plain checkpoint."""
    trainer = quiet_trainer(
        folder, max_steps=2, limit_val_batches=0, callbacks=[QuantizationCallback(preset)], **options
    )
    trainer.fit(module)
    trainer.save_checkpoint(folder / "quantized.ckpt", weights_only=weights_only)
    trainer.strategy.checkpoint_io = TorchCheckpointIO()
    trainer.save_checkpoint(folder / "plain.ckpt", weights_only=weights_only)
    return folder / "quantized.ckpt", load(folder / "plain.ckpt")


class TiedHead(nn.Module):
    """An embedding that is also the weight of the layer behind it."""

    def __init__(self, words: int = 512) -> None:
        super().__init__()
        self.body = nn.Linear(64, 64)
        self.embedding = nn.Embedding(words, 64)
        self.head = nn.Linear(64, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.body(batch))


def test_tied_weights_stay_tied_and_are_stored_once(preset: str, tmp_path: Path) -> None:
    file, before = save_both(Shrink(TiedHead()), preset, tmp_path, weights_only=True)
    after = load(file)
    assert_kept(after, before, preset)
    embedding, head = (after["state_dict"][f"net.{name}.weight"] for name in ("embedding", "head"))
    assert same_memory(embedding, head)
    assert same_bits(embedding, head)
    encoded = payloads_of(file)
    assert encoded["state_dict.net.embedding.weight"] is encoded["state_dict.net.head.weight"]
    one_copy = 512 * 64 * WEIGHTS[preset][3]
    assert file.stat().st_size < 1.6 * one_copy


def test_a_model_with_tied_weights_is_tied_after_resuming(preset: str, tmp_path: Path) -> None:
    file, before = save_both(Shrink(TiedHead()), preset, tmp_path)
    module = Shrink(TiedHead())
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=[QuantizationCallback(preset)])
    trainer.fit(module, ckpt_path=file)
    assert module.net.head.weight is module.net.embedding.weight
    expected = load(file)["state_dict"]
    assert_same(module.state_dict(), expected)
    assert list(expected) == list(before["state_dict"])


def test_tied_weights_whose_paths_ask_for_different_codecs_stay_as_they_are(tmp_path: Path) -> None:
    policy = CheckpointPolicy([Rule("state_dict.*.head.*", "linear"), Rule("state_dict.*", "softsign")])
    file, before = save_both(Shrink(TiedHead()), policy, tmp_path)
    after = load(file)["state_dict"]
    assert set(payloads_of(file)) == {"state_dict.net.body.weight"}
    assert same_memory(after["net.embedding.weight"], after["net.head.weight"])
    assert same_bits(after["net.head.weight"], before["state_dict"]["net.head.weight"])


class TransposedTie(nn.Module):
    """An autoencoder whose decoder is the transposed encoder, in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.randn(64, 96) / 8)
        self.decoder = nn.Parameter(self.encoder.detach().t())
        self.free = nn.Linear(64, 64)

    def forward(self, batch: Tensor) -> Tensor:
        return self.free(batch @ self.encoder @ self.decoder)


class Overlapping(nn.Module):
    """Two parameters that share the middle of one memory, and one that is free."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.randn(12288) / 8
        self.first = nn.Parameter(memory[:8192].view(64, 128))
        self.second = nn.Parameter(memory[4096:].view(64, 128))
        self.free = nn.Linear(64, 64)

    def forward(self, batch: Tensor) -> Tensor:
        return self.free(batch) @ (self.first + self.second)


@pytest.mark.parametrize(
    ("make", "one", "two"),
    [(TransposedTie, "net.encoder", "net.decoder"), (Overlapping, "net.first", "net.second")],
    ids=["transposed", "overlapping"],
)
def test_views_that_overlap_stay_as_they_are(
    make: Callable[[], nn.Module], one: str, two: str, preset: str, tmp_path: Path
) -> None:
    file, before = save_both(Shrink(make()), preset, tmp_path)
    after = load(file)
    assert_kept(after, before, preset, raw=frozenset({one, two}))
    assert same_memory(after["state_dict"][one], after["state_dict"][two])
    after["state_dict"][one].zero_()
    assert bool((after["state_dict"][two] == 0).any()), "they no longer share their elements"
    assert f"state_dict.{one}" not in payloads_of(file)
    assert "state_dict.net.free.weight" in payloads_of(file)


class Fused(nn.LSTM):
    """An LSTM whose weights and biases are views of one flat memory, as cuDNN wants them."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        memory = torch.randn(sum(parameter.numel() for parameter in self.parameters())) / 8
        start = 0
        for parameter in self.parameters():
            parameter.data = memory[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()


def test_views_of_one_memory_that_do_not_overlap_are_encoded_each(preset: str, tmp_path: Path) -> None:
    module = Shrink(Fused(), 5, 64)
    file, before = save_both(module, preset, tmp_path, weights_only=True)
    weight, bias = module.net.weight_ih_l0, module.net.bias_ih_l0
    assert same_memory(weight, bias), "the model is not what this test is about"
    after = load(file)
    assert_kept(after, before, preset)
    assert set(payloads_of(file)) == {"state_dict.net.weight_ih_l0", "state_dict.net.weight_hh_l0"}


def test_a_small_view_does_not_carry_the_whole_memory_into_the_file(preset: str, tmp_path: Path) -> None:
    file, _ = save_both(Shrink(Fused(), 5, 64), preset, tmp_path, weights_only=True)
    for name, tensor in load(file)["state_dict"].items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    assert file.stat().st_size < 32768 * WEIGHTS[preset][3] * 1.25 + 4096


def test_one_view_of_a_larger_memory_is_encoded_alone(tmp_path: Path) -> None:
    memory = torch.randn(100_000)
    QuantizedCheckpointIO().save_checkpoint({"state_dict": {"part": memory[5000:9096]}}, tmp_path / "a.ckpt")
    assert same_bits(load(tmp_path / "a.ckpt")["state_dict"]["part"], stored(memory[5000:9096], *WEIGHTS["resume"][:3]))
    assert (tmp_path / "a.ckpt").stat().st_size < 16_384


class Statistics(nn.Module):
    """Wide BatchNorms and buffers of every kind, all large enough to be quantized if they were weights."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(64, 4096)
        self.norm = nn.BatchNorm1d(4096)
        self.register_buffer("floats", torch.randn(5000))
        self.register_buffer("halves", torch.randn(5000).half())
        self.register_buffer("integers", torch.arange(5000))
        self.register_buffer("bools", torch.arange(5000) % 2 == 0)
        self.register_buffer("complex", torch.randn(5000, dtype=torch.complex64))
        self.register_buffer("unsaved", torch.randn(5000), persistent=False)

    def forward(self, batch: Tensor) -> Tensor:
        return self.norm(self.widen(batch)) + self.floats[0]


def test_buffers_are_never_quantized(preset: str, tmp_path: Path) -> None:
    file, before = save_both(Shrink(Statistics()), preset, tmp_path)
    buffers = {"norm.running_mean", "norm.running_var", "floats", "halves", "integers", "bools", "complex"}
    raw = frozenset(f"net.{name}" for name in buffers)
    assert raw <= set(before["state_dict"])
    assert_kept(load(file), before, preset, raw)
    assert set(payloads_of(file)) == promised_paths(before, preset, raw)
    assert "state_dict.net.norm.weight" in payloads_of(file), "a wide BatchNorm's weight is a weight"


def test_without_a_callback_the_running_statistics_are_told_by_name(preset: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(
        tmp_path, max_steps=2, limit_val_batches=0, plugins=[QuantizedCheckpointIO(checkpoint=preset)]
    )
    trainer.fit(Shrink(nn.Sequential(nn.Linear(64, 4096), nn.BatchNorm1d(4096))))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    weights = {name for name in payloads_of(tmp_path / "last.ckpt") if name.startswith("state_dict.")}
    assert weights == {f"state_dict.net.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")}


class Remembers(nn.Linear):
    """A layer with an extra state, which a state dict carries beside parameters and buffers."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.memory = torch.randn(5000)

    def get_extra_state(self) -> Tensor:
        return self.memory

    def set_extra_state(self, state: Tensor) -> None:
        self.memory = state


class Histogram(torchmetrics.Metric):
    """A metric whose sums are saved with the model: they are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.linspace(0, 1, 5000), dist_reduce_fx="sum", persistent=True)

    def update(self) -> None: ...

    def compute(self) -> Tensor:
        return self.sums


class Measured(nn.Linear):
    """A layer with a metric inside."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.histogram = Histogram()


@pytest.mark.parametrize(
    ("make", "entry"), [(Remembers, "net._extra_state"), (Measured, "net.histogram.sums")], ids=["extra", "metric"]
)
def test_what_a_state_dict_holds_beside_parameters_and_buffers_is_no_weight(
    make: Callable[[], nn.Module], entry: str, preset: str, tmp_path: Path
) -> None:
    file, before = save_both(Shrink(make()), preset, tmp_path)
    assert before["state_dict"][entry].numel() == 5000
    assert_kept(load(file), before, preset, raw=frozenset({entry}))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Conv2d(32, 16, 3).to(memory_format=torch.channels_last), (32, 5, 5)),  # type: ignore[call-overload]
        (nn.Conv3d(32, 16, 2).to(memory_format=torch.channels_last_3d), (32, 3, 3, 3)),  # type: ignore[call-overload]
    ],
    ids=["channels-last", "channels-last-3d"],
)
def test_strides_are_kept(net: nn.Module, shape: tuple[int, ...], preset: str, tmp_path: Path) -> None:
    file, before = save_both(Shrink(net, *shape), preset, tmp_path)
    after = load(file)
    assert not after["state_dict"]["net.weight"].is_contiguous()
    assert_kept(after, before, preset)


@pytest.mark.parametrize("stride", [(1, 64), (4096, 64, 1, 7), (64, 1, 64), (1, 1, 1, 4096)], ids=str)
def test_dense_strides_in_any_order_are_kept(stride: tuple[int, ...], preset: str, tmp_path: Path) -> None:
    shape = {
        (1, 64): (64, 64),
        (4096, 64, 1, 7): (1, 64, 64, 1),
        (64, 1, 64): (64, 64, 1),
        (1, 1, 1, 4096): (1, 4096, 1, 1),
    }
    tensor = torch.randn(4096).as_strided(shape[stride], stride)
    assert_stored_as_promised(tensor, preset, tmp_path)


def assert_stored_as_promised(tensor: Tensor, preset: str, folder: Path) -> None:
    QuantizedCheckpointIO(checkpoint=preset).save_checkpoint({"state_dict": {"weight": tensor}}, folder / "a.ckpt")
    TorchCheckpointIO().save_checkpoint({"state_dict": {"weight": tensor}}, folder / "b.ckpt")
    assert_kept(load(folder / "a.ckpt"), load(folder / "b.ckpt"), preset)
    assert payloads_of(folder / "a.ckpt")


def test_tensors_with_gaps_or_repeated_elements_stay_as_they_are(tmp_path: Path) -> None:
    state_dict = {
        "gaps": torch.randn(64, 256)[:, ::2],
        "repeated": torch.randn(64).expand(128, 64),
        "negative view": torch.randn(4096, dtype=torch.complex64).conj().imag,
        "sparse": torch.randn(64, 64).relu().to_sparse(),
        "empty": torch.empty(0, 4096),
        "scalar": torch.tensor(1.0),
        "4095": torch.randn(4095),
        "float8": torch.randn(4096).to(torch.float8_e4m3fn),
    }
    QuantizedCheckpointIO().save_checkpoint({"state_dict": state_dict}, tmp_path / "a.ckpt")
    after = load(tmp_path / "a.ckpt")["state_dict"]
    assert not payloads_of(tmp_path / "a.ckpt")
    for name, tensor in state_dict.items():
        assert type(after[name]) is type(tensor), name
        if name == "sparse":
            after[name], tensor = after[name].to_dense(), tensor.to_dense()
        assert same_bits(after[name].resolve_neg(), tensor.resolve_neg()), name
        assert after[name].shape == tensor.shape, name


@pytest.mark.filterwarnings("ignore")  # torch's remarks on prototypes
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_whatever_torch_can_save_is_saved(make: Callable[[], Any], preset: str, tmp_path: Path) -> None:
    checkpoint = make()
    TorchCheckpointIO().save_checkpoint(checkpoint, tmp_path / "plain.ckpt")
    QuantizedCheckpointIO(checkpoint=preset).save_checkpoint(checkpoint, tmp_path / "quantized.ckpt")
    before, after = (torch.load(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("plain", "quantized"))
    assert list(map(str, after)) == [*map(str, before), "q8lightning"]
    for key, value in before.items():
        assert type(after[key]) is type(value)


def test_a_layer_that_was_never_used_does_not_stop_a_save(preset: str, tmp_path: Path) -> None:
    module = Shrink(nn.Linear(64, 64))
    module.unused = nn.LazyLinear(64)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.net.parameters())
    train_and_save(tmp_path, module, QuantizationCallback(preset), max_steps=1)
    with keep_encoded():  # torch does not count an uninitialized parameter among what is safe to load
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert isinstance(checkpoint["state_dict"]["net.weight"], QuantizedTensor)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64), ("bf16-mixed", torch.float32)]
)
def test_models_of_every_precision_come_back_in_theirs(
    precision: str, dtype: torch.dtype, preset: str, tmp_path: Path
) -> None:
    module = Autoencoder()
    file, before = save_both(module, preset, tmp_path, precision=precision)
    after = load(file)
    raw = frozenset({"table", "counts"})
    assert_kept(after, before, preset, raw)
    assert after["state_dict"]["decoder.weight"].dtype == dtype
    encoded = set(payloads_of(file))
    assert encoded == promised_paths(before, preset, raw)
    assert "optimizer_states.0.state.0.exp_avg_sq" in encoded
    assert "state_dict.decoder.weight" in encoded


def test_sixteen_bits_save_nothing_over_bfloat16(tmp_path: Path) -> None:
    file, before = save_both(Autoencoder(), "precise", tmp_path, precision="bf16-true")
    assert_kept(load(file), before, "precise", frozenset({"table", "counts"}))
    encoded = set(payloads_of(file))
    assert "state_dict.decoder.weight" not in encoded
    assert "optimizer_states.0.state.0.exp_avg_sq" in encoded


def test_the_gradient_scaler_comes_back_exactly(preset: str, tmp_path: Path) -> None:
    """``precision="16-mixed"`` turns into bfloat16 on a CPU; the plugin itself works there with half precision."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1))
    file, before = save_both(Autoencoder(), preset, tmp_path, plugins=[plugin])
    assert before["MixedPrecision"]["scale"] == 4096.0
    assert_kept(load(file), before, preset, raw=frozenset({"table", "counts"}))


def test_a_compiled_part_of_the_model_keeps_its_names(preset: str, tmp_path: Path) -> None:
    module = Shrink(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)))
    module.net[0] = torch.compile(module.net[0], backend="eager")
    module.register_buffer("large", torch.randn(5000))
    file, before = save_both(module, preset, tmp_path)
    assert "net.0._orig_mod.weight" in before["state_dict"]
    assert_kept(load(file), before, preset, raw=frozenset({"large"}))
    assert "state_dict.net.0._orig_mod.weight" in payloads_of(file)


def test_a_deepcopied_payload_stays_encoded_and_tied() -> None:
    payload = QuantizedTensor.encode(torch.randn(64, 64), get_codec("linear", 256, residual_bits=8), "weight")
    first, second = copy.deepcopy([payload, payload])
    assert type(first) is QuantizedTensor
    assert first is second is not payload
    assert [part.data_ptr() for part in first.parts] != [part.data_ptr() for part in payload.parts]
    assert same_bits(first.decode(), payload.decode())


def test_keep_encoded_ends_with_its_block(tmp_path: Path) -> None:
    QuantizedCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.randn(64, 64)}}, tmp_path / "a.ckpt")
    with keep_encoded():
        assert type(load(tmp_path / "a.ckpt")["state_dict"]["weight"]) is QuantizedTensor
        with keep_encoded():
            pass
        assert type(load(tmp_path / "a.ckpt")["state_dict"]["weight"]) is QuantizedTensor
    assert type(load(tmp_path / "a.ckpt")["state_dict"]["weight"]) is Tensor


def test_what_was_kept_encoded_saves_as_the_same_file_again(tmp_path: Path) -> None:
    io = QuantizedCheckpointIO()
    io.save_checkpoint({"state_dict": {"weight": torch.randn(64, 64)}}, tmp_path / "a.ckpt")
    with keep_encoded():
        io.save_checkpoint(io.load_checkpoint(tmp_path / "a.ckpt"), tmp_path / "b.ckpt")
    assert_same(load(tmp_path / "b.ckpt"), load(tmp_path / "a.ckpt"))
