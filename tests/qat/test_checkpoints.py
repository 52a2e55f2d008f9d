"""A checkpoint of QAT resumes, loads into the plain model, and holds codes that decode to what forward used."""

import copy
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from support.models import Autoencoder, quiet_trainer
from support.straight_through import Trained, quantized
from torch import Tensor, nn

import q8lightning.export.quantized
from q8lightning import (
    CheckpointPolicy,
    QATConfig,
    QuantizationCallback,
    QuantizedCheckpointIO,
    QuantizedTensor,
    Rule,
    WeightRule,
    export_quantized,
    keep_encoded,
)
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.codebook import BUILTIN


class Convolutional(Trained):
    """Several ranks and dtypes of weights, one in another order of memory, a tied one and small ones."""

    def __init__(self) -> None:
        conv = nn.Conv2d(16, 64, 3, padding=1)
        net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), conv, nn.AdaptiveAvgPool2d(2),
                            nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 256), nn.Linear(256, 256))  # fmt: skip
        net[7].weight = net[6].weight
        net.to(memory_format=torch.channels_last)
        super().__init__(net)
        self.seen: dict[str, Tensor] = {}

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.seen = {name: value.detach().clone() for name, value in self.named_parameters()}
        super().validation_step(batch, index)


RULES = {
    "first stage": WeightRule(codebook="linear", block_size=256),
    "other blocks": WeightRule(codebook="linear", block_size=64),
    "channels": WeightRule(codebook="linear", block_size=256, axis=0),
    "int4": WeightRule(codebook="int4", block_size=64),
    "int3": WeightRule(codebook="int3", block_size=32, axis=0),
    "nf4": WeightRule(codebook="normal_float4", block_size=64),
    "dynamic": WeightRule(codebook="dynamic", block_size=128),
    "mine": WeightRule(codebook=[-1.0, -0.25, 0.0, 0.5, 1.0], block_size=4096),
}


def trained(folder: Path, rule: WeightRule, checkpoint: Any = "resume", steps: int = 3) -> Convolutional:
    torch.manual_seed(0)
    model = Convolutional()
    callback = QuantizationCallback(checkpoint, qat=QATConfig([rule]))
    trainer = quiet_trainer(folder, max_steps=steps, limit_val_batches=0, callbacks=[callback])
    trainer.fit(model)
    trainer.save_checkpoint(folder / "qat.ckpt")
    trainer.limit_val_batches = 1
    trainer.validate(model)  # what the forward pass uses
    return model


def documented_reader(path: Path) -> dict[str, Tensor]:
    """Run the reader that the module's docstring shows, as it stands there."""
    source = q8lightning.export.quantized.__doc__.split("::\n\n", 1)[1]
    assert len(source.strip().splitlines()) <= 11
    namespace: dict[str, Any] = {"torch": torch}
    exec(textwrap.dedent(source), namespace)
    state: dict[str, Tensor] = namespace["load_codes"](path)
    return state


@pytest.mark.parametrize("checkpoint", ["resume", "compact", None])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_codes_decode_to_what_the_forward_pass_used(
    rule: WeightRule, checkpoint: str | None, tmp_path: Path
) -> None:
    model = trained(tmp_path, rule, checkpoint)
    export_quantized(tmp_path / "qat.ckpt", tmp_path / "float.ckpt")
    export_quantized(tmp_path / "qat.ckpt", tmp_path / "codes.pt", format="codes")
    plain = torch.load(tmp_path / "float.ckpt", weights_only=True)["state_dict"]
    codes = documented_reader(tmp_path / "codes.pt")
    expected = {**model.seen, "net.7.weight": model.seen["net.6.weight"]}
    assert list(plain) == list(codes) == list(model.state_dict())
    for name, value in expected.items():
        if value.ndim < 2:
            continue
        assert not torch.equal(value, model.state_dict()[name])
        for state in (plain, codes):
            assert state[name].dtype == value.dtype
            assert torch.equal(state[name], value), name
    assert torch.equal(codes["net.5.running_var"], model.net[5].running_var)


@pytest.mark.parametrize("name", ["first stage", "int4"])
def test_codes_are_stored_once(name: str, tmp_path: Path) -> None:
    trained(tmp_path, RULES[name])
    with keep_encoded():
        checkpoint = torch.load(tmp_path / "qat.ckpt", weights_only=True)
    entries = checkpoint["q8lightning"]["qat"]
    payload, entry = checkpoint["state_dict"]["net.6.weight"], entries["net.6.weight"]
    assert isinstance(payload, QuantizedTensor)
    assert payload.codec.residual_bits  # the fidelity of the preset
    assert entries["net.7.weight"] is entry  # tied
    if name == "first stage":
        assert "codes" not in entry
    else:
        assert entry["codes"].numel() == 256 * 256 // 2  # four bits each
    assert "codes" not in entries["net.1.weight"]  # too small to be encoded: its codes follow from its values


SAME_CODEBOOK = {
    "int4": Rule("state_dict.*", "int4", 64),
    "normal_float4": Rule("state_dict.*", "normal_float4", 64),
    "softsign3": Rule("state_dict.*", "softsign", 64, bits=3),
    "linear6": Rule("state_dict.*", "linear", 64, bits=6, residual_bits=5),
}
"""Rules for masters with the codebook that they are trained with."""


@pytest.mark.parametrize("codebook", SAME_CODEBOOK)
def test_codes_of_a_rule_with_the_same_codebook_are_stored_once_in_its_bits(codebook: str, tmp_path: Path) -> None:
    rule = SAME_CODEBOOK[codebook]
    policy = CheckpointPolicy([rule], min_sqnr_db=None)
    model = trained(tmp_path, WeightRule(codebook=codebook, block_size=64), policy)
    with keep_encoded():
        checkpoint = torch.load(tmp_path / "qat.ckpt", weights_only=True)
    payload = checkpoint["state_dict"]["net.6.weight"]
    numel, bits = 256 * 256, int(codebook[-1])
    assert (payload.codec.bits, payload.codec.residual_bits) == (bits, rule.residual_bits)
    assert payload.nbytes == numel * (bits + rule.residual_bits) // 8 + numel // 64 * 4
    entry = checkpoint["q8lightning"]["qat"]["net.6.weight"]
    assert entry == {"codebook": codebook, "block_size": 64, "axis": None}
    export_quantized(tmp_path / "qat.ckpt", tmp_path / "codes.pt", format="codes")
    assert torch.equal(documented_reader(tmp_path / "codes.pt")["net.6.weight"], model.seen["net.6.weight"])
    loaded = torch.load(tmp_path / "qat.ckpt", weights_only=True)["state_dict"]["net.6.weight"]
    again = WeightCodec(codebook, 64).fake_quantize(loaded)
    assert torch.equal(again, model.seen["net.6.weight"])  # a resumed run goes on with the same weights


def test_a_resumed_master_has_the_codes_of_the_one_that_was_saved(tmp_path: Path) -> None:
    """The masters are off by half a step of the residual, but their first stage is exact: forward uses the same."""
    model = trained(tmp_path, RULES["first stage"])
    loaded = torch.load(tmp_path / "qat.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(loaded["net.6.weight"], model.net[6].weight)
    assert torch.equal(quantized(loaded["net.6.weight"]), model.seen["net.6.weight"])


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_codes_of_other_dtypes_decode_to_what_the_forward_pass_used(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Convolutional()
    callback = QuantizationCallback(qat=QATConfig([RULES["int4"]]))
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=1, callbacks=[callback], precision=precision)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "qat.ckpt")
    trainer.validate(model)
    export_quantized(tmp_path / "qat.ckpt", tmp_path / "codes.pt", format="codes")
    codes = documented_reader(tmp_path / "codes.pt")
    for name in ("net.2.weight", "net.6.weight"):
        assert codes[name].dtype == model.seen[name].dtype
        assert torch.equal(codes[name], model.seen[name])


@pytest.mark.parametrize("codebook", [name for name, book in BUILTIN.items() if book.signed])
def test_saving_what_was_exported_changes_nothing(codebook: str, tmp_path: Path) -> None:
    trained(tmp_path, WeightRule(codebook=codebook, block_size=64), steps=1)
    export_quantized(tmp_path / "qat.ckpt", tmp_path / "float.ckpt")
    first = torch.load(tmp_path / "float.ckpt", weights_only=True)["state_dict"]
    model = Convolutional()
    model.load_state_dict(first)
    callback = QuantizationCallback(qat=QATConfig([WeightRule(codebook=codebook, block_size=64)]))
    trainer = quiet_trainer(tmp_path, limit_val_batches=1, callbacks=[callback])
    trainer.validate(model)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    export_quantized(tmp_path / "again.ckpt", tmp_path / "again_float.ckpt")
    second = torch.load(tmp_path / "again_float.ckpt", weights_only=True)["state_dict"]
    for name, value in first.items():
        if value.ndim >= 2:
            assert torch.equal(second[name], value)


def test_an_exported_checkpoint_loads_without_the_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Autoencoder()
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[QuantizationCallback(qat={})])
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "qat.ckpt")
    export_quantized(tmp_path / "qat.ckpt", tmp_path / "float.ckpt")
    export_quantized(tmp_path / "qat.ckpt", tmp_path / "codes.pt", format="codes")
    program = """
        import sys, torch
        sys.modules["q8lightning"] = None  # importing it would fail
        from support.models import Autoencoder
        model = Autoencoder.load_from_checkpoint("float.ckpt")
        torch.load("codes.pt", weights_only=True)
        torch.save(model.state_dict(), "loaded.pt")
    """
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, env=environment, check=True)
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    assert torch.equal(loaded["decoder.weight"], quantized(model.decoder.weight))
    sizes = {name: (tmp_path / name).stat().st_size for name in ("float.ckpt", "codes.pt", "qat.ckpt")}
    assert sizes["codes.pt"] < sizes["qat.ckpt"]


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = Autoencoder()
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[QuantizationCallback()])
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"says nothing of quantized weights; export a checkpoint that a Trainer with"):
        export_quantized(tmp_path / "plain.ckpt", tmp_path / "float.ckpt")
    with pytest.raises(ValueError, match=r"format is one of float, codes.*, got 'onnx'"):
        export_quantized(tmp_path / "plain.ckpt", tmp_path / "float.ckpt", format="onnx")  # type: ignore[arg-type]
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[QuantizationCallback(None, qat={})])
    trainer.fit(model)
    model.decoder.weight.data[0, 0] = torch.nan
    trainer.save_checkpoint(tmp_path / "nan.ckpt")
    with pytest.raises(ValueError, match=r"decoder\.weight holds NaN or infinity"):
        export_quantized(tmp_path / "nan.ckpt", tmp_path / "float.ckpt")
    assert not (tmp_path / "float.ckpt").exists()


# Into the plain model, and the other way round


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_checkpoints_load_with_and_without_qat(before: bool, after: bool, tmp_path: Path) -> None:
    def fit(steps: int, qat: bool, ckpt_path: Path | None = None) -> tuple[Autoencoder, dict[str, Any]]:
        torch.manual_seed(0)
        callbacks = [QuantizationCallback(None, qat={} if qat else None)]
        trainer = quiet_trainer(tmp_path, max_steps=steps, limit_val_batches=0, callbacks=callbacks)
        model = Autoencoder()
        start: dict[str, Any] = {}
        model.on_train_start = lambda: start.update(  # type: ignore[method-assign]
            weights=copy.deepcopy(model.state_dict()), optimizer=copy.deepcopy(trainer.optimizers[0].state_dict())
        )
        trainer.fit(model, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return model, start

    first, _ = fit(3, before)
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(Autoencoder().state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, start = fit(5, after, tmp_path / "3.ckpt")
    said = [str(each.message) for each in caught if "trained quantized" in str(each.message)]
    assert len(said) == (before and not after)
    if said:
        names = list(saved["q8lightning"]["qat"])
        assert f"trained quantized ({', '.join(names)})" in said[0]
        assert "QuantizationCallback(qat=...)" in said[0]
    for name, value in first.state_dict().items():
        assert torch.equal(start["weights"][name], value)
    for index, state in saved["optimizer_states"][0]["state"].items():
        assert torch.equal(start["optimizer"]["state"][index]["exp_avg"], state["exp_avg"])
    loaded = Autoencoder.load_from_checkpoint(tmp_path / "3.ckpt")
    assert torch.equal(loaded.decoder.weight, first.decoder.weight)


def test_validating_a_checkpoint_runs_with_its_codes(tmp_path: Path) -> None:
    model = trained(tmp_path, RULES["first stage"])
    fresh = Convolutional()
    trainer = quiet_trainer(tmp_path, limit_val_batches=1, callbacks=[QuantizationCallback(qat=QATConfig())])
    trainer.validate(fresh, ckpt_path=tmp_path / "qat.ckpt")
    assert fresh.evaluated[-1] == model.evaluated[-1]
    for name, value in model.seen.items():
        if value.ndim >= 2:
            assert torch.equal(fresh.seen[name], value)


def test_a_checkpoint_of_weights_only_holds_the_codes_too(tmp_path: Path) -> None:
    model = trained(tmp_path, RULES["int4"])
    trainer = quiet_trainer(
        tmp_path, limit_val_batches=1, callbacks=[QuantizationCallback(qat={"weights": [RULES["int4"]]})]
    )
    trainer.validate(model)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    export_quantized(tmp_path / "weights.ckpt", tmp_path / "float.ckpt")
    plain = torch.load(tmp_path / "float.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(plain["net.6.weight"], model.seen["net.6.weight"])


def test_the_codes_beside_an_average_are_those_of_the_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Trained(nn.Sequential(nn.Linear(64, 64)))
    rule = RULES["int4"]
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    callbacks = [WeightAveraging(), saving, QuantizationCallback(qat=QATConfig([rule]))]
    trainer = quiet_trainer(tmp_path, max_steps=4, limit_val_batches=0, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(model)
    export_quantized(tmp_path / "step=4.ckpt", tmp_path / "float.ckpt")
    plain = torch.load(tmp_path / "float.ckpt", weights_only=True)
    assert "current_model_state" not in plain
    # After training the model holds the average.
    assert torch.equal(plain["state_dict"]["net.0.weight"], WeightCodec("int4", 64).fake_quantize(model.net[0].weight))


def test_a_checkpoint_io_of_the_users_own_learns_of_the_codes(tmp_path: Path) -> None:
    model = Trained(nn.Sequential(nn.Linear(64, 64)))
    callback = QuantizationCallback(None, qat={"weights": [{"codebook": "int4", "block_size": 64}]})
    trainer = quiet_trainer(
        tmp_path, max_steps=1, limit_val_batches=0, callbacks=[callback], plugins=[QuantizedCheckpointIO()]
    )
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "qat.ckpt")
    export_quantized(tmp_path / "qat.ckpt", tmp_path / "float.ckpt")
    plain = torch.load(tmp_path / "float.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(plain["net.0.weight"], quantized(model.net[0].weight, "int4", 64))
