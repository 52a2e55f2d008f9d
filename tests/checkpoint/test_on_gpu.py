"""The same promises where the tensors live on a GPU: encoded there by the kernels, decoded there or on the host."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.models import Shrink, quiet_trainer
from support.promises import assert_same, load, tensors
from torch import Tensor, nn

from q8lightning import (
    CheckpointPolicy,
    CorruptCheckpointError,
    QuantizationCallback,
    QuantizedCheckpointIO,
    keep_encoded,
)
from q8lightning.checkpoint.encode.checkpoint import encode_and_report
from q8lightning.quantization.codecs.table import get_codec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CODECS = {
    "weight": get_codec("linear", 256, residual_bits=3),
    "exp_avg": get_codec("softsign", 128, bits=6, scale_dtype="bfloat16"),
    "exp_avg_sq": get_codec("log", 128, bits=6, scale_dtype="bfloat16"),
}


class SaveWhileTraining(pl.Callback):
    """Saves after every batch, while the state is on the GPU, and keeps what it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.live: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        trainer.save_checkpoint(self.path)
        moments = trainer.optimizers[0].state_dict()["state"][0]
        assert pl_module.net.weight.is_cuda
        self.live = {"weight": pl_module.net.weight.detach(), **moments}
        self.live = {name: self.live[name].cpu().clone() for name in CODECS}


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_state_on_the_gpu_comes_back_as_the_host_encodes_and_decodes_it(place: str, tmp_path: Path) -> None:
    saver = SaveWhileTraining(tmp_path / "a.ckpt")
    callbacks = [saver, QuantizationCallback()]
    trainer = quiet_trainer(tmp_path, accelerator="gpu", max_steps=2, limit_val_batches=0, callbacks=callbacks)
    trainer.fit(Shrink(nn.Linear(300, 300), 300))
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True, map_location=place)
    loaded = {"weight": checkpoint["state_dict"]["net.weight"], **checkpoint["optimizer_states"][0]["state"][0]}
    for name, codec in CODECS.items():
        assert loaded[name].device.type == place
        expected = codec.decode(codec.encode(saver.live[name].view(-1)), torch.float32).view(300, 300)
        assert torch.equal(loaded[name].cpu(), expected), name


# In the background


class BigState(nn.Module):
    """Encoded weights, raw ones of odd sizes and types, a tied pair and views of one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded = nn.ModuleList(nn.Linear(256, 256) for _ in range(8))
        self.small = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in (1, 3, 5, 127, 1000))
        self.tied = self.small[4]
        memory = torch.randn(300)
        self.register_buffer("first", memory[:200])
        self.register_buffer("second", memory[100:])
        self.register_buffer("flags", torch.arange(13) % 3 == 0)


def checkpoint_of(module: nn.Module, step: int) -> dict[str, Any]:
    moments = {
        index: {"exp_avg": parameter.detach() * 2, "exp_avg_sq": parameter.detach() ** 2}
        for index, parameter in enumerate(module.parameters())
    }
    return {"state_dict": module.state_dict(), "optimizer_states": [{"state": moments}], "loops": {"step": step}}


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    module = BigState().cuda()
    module.second = module.first.as_strided((200,), (1,), 0)  # a view of the same memory on the device
    return module


def test_what_training_writes_after_the_call_is_not_in_the_file(module: nn.Module, tmp_path: Path) -> None:
    """Right after the call, kernels on the training's stream overwrite everything, again and again."""
    io = QuantizedCheckpointIO(async_save=True)
    for step in range(5):
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.copy_(torch.randn_like(tensor, dtype=torch.float32))
        checkpoint = checkpoint_of(module, step)
        QuantizedCheckpointIO().save_checkpoint(checkpoint, tmp_path / "expected.ckpt")
        io.save_checkpoint(checkpoint, tmp_path / "a.ckpt")
        for _ in range(20):
            for _, tensor in tensors(checkpoint):
                tensor.fill_(7)
        del checkpoint  # the allocator may hand its memory out
        junk = [torch.full((2**20,), 3.0, device="cuda") for _ in range(20)]
        io.wait_until_durable()
        del junk
        assert_same(load(tmp_path / "a.ckpt"), load(tmp_path / "expected.ckpt"))
    io.teardown()


@pytest.mark.parametrize("async_save", [True, False])
def test_it_loads_to_where_it_was(async_save: bool, module: nn.Module, tmp_path: Path) -> None:
    io = QuantizedCheckpointIO(async_save=async_save)
    io.save_checkpoint(checkpoint_of(module, 0), tmp_path / "a.ckpt")
    io.teardown()
    for _, tensor in tensors(load(tmp_path / "a.ckpt")):
        assert tensor.device == torch.device("cuda:0")
    state = load(tmp_path / "a.ckpt")["state_dict"]
    assert state["first"].data_ptr() == state["second"].data_ptr()
    assert state["tied"].data_ptr() == state["small.4"].data_ptr()
    assert all(not tensor.is_cuda for _, tensor in tensors(load(tmp_path / "a.ckpt", map_location="cpu")))


def test_a_training_stream_of_its_own_is_waited_for(module: nn.Module, tmp_path: Path) -> None:
    io = QuantizedCheckpointIO(async_save=True)
    stream = torch.cuda.Stream()
    weight = module.small[4]
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(200_000_000)  # the value is not there yet when the save returns
        weight.fill_(42)
        io.save_checkpoint({"state_dict": {"raw": weight.detach()}}, tmp_path / "a.ckpt")
        weight.fill_(-1)
    io.teardown()
    assert bool((load(tmp_path / "a.ckpt")["state_dict"]["raw"] == 42).all())


@pytest.mark.filterwarnings("ignore:stored as they are")
def test_what_no_codec_holds_is_saved_while_the_device_is_busy(module: nn.Module, tmp_path: Path) -> None:
    """It is copied on a stream that is waited for, not behind what training has asked for in the meantime."""
    io = QuantizedCheckpointIO(async_save=True)
    weight = module.encoded[0].weight.data
    weight[0, 0] = torch.nan
    for _ in range(2):  # the second time, nothing has to be loaded first
        weight.add_(1)
        io.save_checkpoint(checkpoint_of(module, 0), tmp_path / "a.ckpt")
        torch.cuda._sleep(1_000_000_000)
        io.wait_until_durable()
        loaded = load(tmp_path / "a.ckpt")["state_dict"]["encoded.0.weight"]
        assert torch.equal(loaded.nan_to_num(), weight.nan_to_num())
    io.teardown()


def test_pinned_memory_is_reused_and_given_back(module: nn.Module, tmp_path: Path) -> None:
    io = QuantizedCheckpointIO(async_save=True)
    addresses = set()
    for step in range(3):
        io.save_checkpoint(checkpoint_of(module, step), tmp_path / "a.ckpt")
        io.wait_until_durable()
        memory = io._memory._memory
        assert memory is not None
        assert memory.is_pinned()
        addresses.add(memory.data_ptr())
        assert io._memory.nbytes < 1.1 * (tmp_path / "a.ckpt").stat().st_size
    assert len(addresses) == 1
    io.teardown()
    assert io._memory.nbytes == 0


def test_host_memory_that_nobody_gave_back_disturbs_nobody(module: nn.Module, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # memory that cannot be locked is worth a warning
        for step in range(30):
            io = QuantizedCheckpointIO()
            io.save_checkpoint(checkpoint_of(module, step), tmp_path / "a.ckpt")
    assert torch.zeros(3, device="cuda").sum() == 0


def test_the_memory_of_the_device_is_let_go(module: nn.Module, tmp_path: Path) -> None:
    io = QuantizedCheckpointIO(
        checkpoint="precise", async_save=True
    )  # what it encodes needs no review, whose plan is kept
    checkpoint = checkpoint_of(module, 0)
    io.save_checkpoint(checkpoint, tmp_path / "a.ckpt")  # tables of the codecs are kept
    io.finish()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        io.save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    io.teardown()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_flipped_bit_is_noticed_wherever_the_data_goes(place: str, module: nn.Module, tmp_path: Path) -> None:
    QuantizedCheckpointIO().save_checkpoint({"state_dict": module.state_dict()}, tmp_path / "a.ckpt")
    with keep_encoded():
        data = load(tmp_path / "a.ckpt", map_location="cpu")["state_dict"]["encoded.3.weight"].data
    content = bytearray((tmp_path / "a.ckpt").read_bytes())
    content[content.find(data.numpy().tobytes()) + 1000] ^= 4
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"encoded\.3\.weight"):
        load(tmp_path / "a.ckpt", map_location=place)


def test_two_hundred_steps_with_a_save_at_each_train_the_same_weights(tmp_path: Path) -> None:
    def train(*callbacks: pl.Callback) -> dict[str, Tensor]:
        torch.manual_seed(6)
        model = Shrink(nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 300)), 300)
        trainer = quiet_trainer(
            tmp_path,
            accelerator="gpu",
            max_steps=200,
            limit_val_batches=0,
            enable_checkpointing=bool(callbacks),
            callbacks=[*callbacks],
        )
        trainer.fit(model)
        return model.state_dict()

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max")
    assert_same(train(saving, QuantizationCallback(async_save=True)), train())
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=200.ckpt"]


def test_to_encode_and_measure_waits_for_the_gpu_once() -> None:
    """Whether tensors can be held, what they lose and how far the update direction is off come in one transfer."""
    policy = CheckpointPolicy.of("resume")
    moments = {
        i: {"exp_avg": torch.randn(64, 128, device="cuda"), "exp_avg_sq": torch.rand(64, 128, device="cuda") + 0.1}
        for i in range(3)
    }
    state = {f"w{i}": torch.randn(64, 128, device="cuda") for i in range(3)}
    checkpoint = {"state_dict": state, "optimizer_states": [{"state": moments, "param_groups": []}]}
    encode_and_report(checkpoint, policy)  # makes the work lists
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = encode_and_report(checkpoint, policy).report
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in caught if "synchroniz" in str(each.message)]) == 1
    host = {"state_dict": {name: x.cpu() for name, x in state.items()}}
    host |= {"optimizer_states": [{"state": {i: {k: x.cpu() for k, x in m.items()} for i, m in moments.items()}}]}
    assert report.metrics == pytest.approx(encode_and_report(host, policy).report.metrics, rel=1e-4)


def test_a_trainer_resumes_with_optimizer_states_that_were_decoded_on_the_gpu(tmp_path: Path) -> None:
    path, io = tmp_path / "a.ckpt", QuantizedCheckpointIO()
    torch.manual_seed(0)
    state = {"exp_avg": torch.randn(300, 300), "exp_avg_sq": torch.rand(300, 300), "step": torch.tensor(3.0)}
    content = {"state_dict": {"net.weight": torch.randn(300, 300)}, "optimizer_states": [{"state": {0: state}}]}
    io.save_checkpoint(content, path)
    expected = load(path)
    io.optimizer_device = torch.device("cuda", 0)
    found = io.load_checkpoint(path)
    assert not found["state_dict"]["net.weight"].is_cuda
    assert torch.equal(found["state_dict"]["net.weight"], expected["state_dict"]["net.weight"])
    for name, value in expected["optimizer_states"][0]["state"][0].items():
        there = found["optimizer_states"][0]["state"][0][name]
        assert there.is_cuda == (name != "step")
        torch.testing.assert_close(there.cpu(), value, rtol=5e-7 if name == "exp_avg_sq" else 0, atol=0)
