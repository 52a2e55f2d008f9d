"""``compress`` writes what the callback would have saved, ``decompress`` what the callback would have restored."""

import os
import resource
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from support.audit import listening
from support.files import flip, names, place_of
from support.models import Autoencoder, quiet_trainer
from support.promises import (
    assert_same,
    assert_same_content,
    assert_same_summary,
    load,
    payloads_of,
    same_bits,
    same_memory,
    same_parts,
    without_summary,
)
from support.steps import Steps
from torch import Tensor, nn

from q8lightning import (
    CheckpointPolicy,
    QATConfig,
    QuantizationCallback,
    QuantizedCheckpointIO,
    Rule,
    WeightRule,
    export_quantized,
    keep_encoded,
)
from q8lightning.checkpoint.policy import PRESETS
from q8lightning.tools import compress, decompress
from q8lightning.tools.open_checkpoint import open_checkpoint

Run = Callable[..., Any]


# What the callback would have done


def test_compress_makes_the_codes_of_the_callback(
    run: Run, plain: Path, by_callback: Path, preset: str, tmp_path: Path
) -> None:
    target = tmp_path / "out.ckpt"
    assert run("compress", plain, target, "--preset", preset, "--keep", "state_dict.table").status == 0
    made, expected = payloads_of(target), payloads_of(by_callback)
    assert list(made) == list(expected)
    assert all(same_parts(made[path], expected[path]) for path in expected)
    assert all(made[path].checksum == expected[path].checksum for path in expected)
    after, before = load(target), load(by_callback)
    keep, *after["q8lightning"]["policy"]["rules"] = after["q8lightning"]["policy"]["rules"]
    assert keep["pattern"] == "state_dict.table"
    assert list(after) == list(before)
    assert before["q8lightning"].pop("parameters"), "which only the callback knows"
    assert list(after["q8lightning"]) == list(before["q8lightning"])
    assert set(after["q8lightning"]["tensors"]) == set(expected)
    assert_same(without_summary(after), without_summary(before))
    assert_same_summary(after["q8lightning"], before["q8lightning"])


def test_without_a_model_buffers_count_as_weights(run: Run, plain: Path, preset: str, tmp_path: Path) -> None:
    run("compress", plain, tmp_path / "out.ckpt", "--preset", preset)
    QuantizedCheckpointIO(checkpoint=preset).save_checkpoint(load(plain), tmp_path / "io.ckpt")
    assert "state_dict.table" in payloads_of(tmp_path / "out.ckpt")
    assert_same_content(tmp_path / "out.ckpt", tmp_path / "io.ckpt")


def test_decompress_returns_what_the_callback_would_have_restored(
    run: Run, plain: Path, by_callback: Path, preset: str, tmp_path: Path
) -> None:
    run("compress", plain, tmp_path / "small.ckpt", "--preset", preset, "--keep", "state_dict.table")
    assert run("decompress", tmp_path / "small.ckpt", tmp_path / "large.ckpt").status == 0
    assert run("decompress", by_callback, tmp_path / "too.ckpt").status == 0
    expected = without_summary(load(by_callback))
    assert_same(load(tmp_path / "large.ckpt"), expected)
    assert_same(without_summary(load(tmp_path / "too.ckpt")), expected)
    assert list(expected) == list(load(plain))
    assert payloads_of(tmp_path / "large.ckpt") == {}


def test_resume_is_the_preset_if_none_is_given(run: Run, plain: Path, tmp_path: Path) -> None:
    run("compress", plain, tmp_path / "a.ckpt")
    assert payloads_of(tmp_path / "a.ckpt")["state_dict.decoder.weight"].codec.residual_bits


# Every door


class Watch(pl.Callback):
    """Copies the weights when training starts: after everything was restored."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.optimizer = trainer.optimizers[0].state_dict()["state"][0]["exp_avg"].clone()


@pytest.mark.parametrize("undo", [False, True], ids=["compressed", "decompressed"])
def test_what_was_converted_by_hand_loads_through_every_door(
    undo: bool, run: Run, plain: Path, by_callback: Path, preset: str, tmp_path: Path
) -> None:
    file = tmp_path / "hand.ckpt"
    run("compress", plain, file, "--preset", preset, "--keep", "state_dict.table")
    if undo:
        run("decompress", file, tmp_path / "undone.ckpt")
        file = tmp_path / "undone.ckpt"
    expected = load(by_callback)

    assert_same(load(file)["state_dict"], expected["state_dict"])
    assert_same(torch.load(file, weights_only=False, mmap=True)["state_dict"], expected["state_dict"])
    assert_same(Autoencoder.load_from_checkpoint(file, weights_only=True).state_dict(), expected["state_dict"])

    watch = Watch()
    trainer = quiet_trainer(tmp_path, max_steps=4, limit_val_batches=0, callbacks=[watch])
    trainer.fit(Autoencoder(), ckpt_path=file, weights_only=True)
    assert_same(watch.weights, dict(expected["state_dict"]))
    assert same_bits(watch.optimizer, expected["optimizer_states"][0]["state"][0]["exp_avg"])
    assert trainer.global_step == 4

    module = Autoencoder()
    for stage in ("validate", "test"):
        getattr(quiet_trainer(tmp_path), stage)(module, ckpt_path=file, verbose=False, weights_only=True)
        assert_same(module.state_dict(), expected["state_dict"])
        nn.init.zeros_(module.decoder.weight)


def test_a_decompressed_checkpoint_needs_no_q8lightning(run: Run, plain: Path, tmp_path: Path) -> None:
    names = [f"{preset}_{kind}" for preset in PRESETS for kind in ("undone", "small")]
    for preset in PRESETS:
        run("compress", plain, tmp_path / f"{preset}_small", "--preset", preset)
        run("decompress", tmp_path / f"{preset}_small", tmp_path / f"{preset}_undone")
    code = (
        "import sys; sys.modules['q8lightning'] = None\n"
        "import torch\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        print(torch.load(path, weights_only=True)['state_dict']['decoder.weight'].double().sum().item())\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__)\n"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in names)]
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # as where nothing of ours is installed
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    printed = done.stdout.split()
    for preset, undone, small in zip(PRESETS, printed[::2], printed[1::2], strict=True):
        expected = load(tmp_path / f"{preset}_small")["state_dict"]["decoder.weight"].double().sum().item()
        assert float(undone) == expected
        assert small == "UnpicklingError", "the test itself: the compressed one does need it"


# Tensors that share memory, lie oddly in it, or are no weights


def special_checkpoint() -> dict[str, Any]:
    """Return a checkpoint with one of everything, as a Trainer could have saved it."""
    make = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    tied, transposed, overlapping = normal(96, 64), normal(64, 128), normal(12288)
    lstm = nn.LSTM(64, 32)
    state: OrderedDict[str, Any] = OrderedDict(
        first=tied,
        body=normal(64, 64),
        second=tied.view(96, 64),
        channels_last=normal(16, 8, 6, 8).to(memory_format=torch.channels_last),
        encoder=transposed,
        decoder=transposed.t(),
        left=overlapping[:8192],
        right=overlapping[4096:],
        half=normal(64, 64).half(),
        brain=normal(64, 80).bfloat16(),
        double=normal(64, 72).double(),
        not_finite=normal(64, 64).index_fill(0, torch.tensor(3), torch.nan),
        complex=torch.randn(64, 64, dtype=torch.complex64, generator=make),
        sparse=torch.eye(100).to_sparse(),
        integers=torch.arange(5000),
        empty=torch.empty(0, 7),
        scalar=torch.tensor(3.0),
        part_of_a_larger_one=normal(100, 100)[:70],
        with_gaps=normal(100, 100)[:, ::2],
        parameter=nn.Parameter(normal(64, 64)),
        frozen=nn.Parameter(normal(64, 64), requires_grad=False),
        **{f"lstm.{name}": value for name, value in fused(lstm).items()},
    )
    state._metadata = OrderedDict([("", {"version": 1}), ("body", {"version": 2})])  # type: ignore[attr-defined]
    moments = normal(64, 64)
    return {
        "epoch": 3,
        "state_dict": state,
        "loops": {"fit_loop": {"state": torch.ones(5000)}},
        "callbacks": {"Mine": {"large": torch.ones(5000), "same": moments}},
        "optimizer_states": [
            {"state": {}, "param_groups": [{"params": [], "lr": 0.1}]},
            {
                "state": {
                    0: {"step": torch.tensor(2.0), "exp_avg": moments, "exp_avg_sq": moments.square()},
                    3: {"step": torch.tensor(2.0), "exp_avg": normal(64, 64), "exp_avg_sq": -moments.square()},
                },
                "param_groups": [{"params": [0, 3], "lr": torch.tensor(0.1), "betas": (0.9, 0.99)}],
            },
        ],
        "lr_schedulers": [],
        "hyper_parameters": {"width": 64, "names": ("a", "b"), "set": {1, 2}},
    }


def fused(module: nn.LSTM) -> dict[str, Tensor]:
    """Return the state of an LSTM as CUDA keeps it: all weights in one memory."""
    state = module.state_dict()
    memory = torch.empty(sum(value.numel() for value in state.values()))
    views, start = {}, 0
    for name, value in state.items():
        views[name] = memory[start : start + value.numel()].view_as(value).copy_(value)
        start += value.numel()
    return views


def test_special_tensors_are_what_the_plugin_makes_of_them(run: Run, preset: str, tmp_path: Path) -> None:
    torch.save(special_checkpoint(), tmp_path / "plain.ckpt")
    done = run("compress", tmp_path / "plain.ckpt", tmp_path / "out.ckpt", "--preset", preset)
    assert done.status == 0
    assert "state_dict.not_finite (it holds NaN or infinity)" in done.err
    assert "optimizer_states.1.state.3.exp_avg_sq (it holds a negative value)" in done.err
    with pytest.warns(UserWarning, match="stored as they are"):
        QuantizedCheckpointIO(checkpoint=preset).save_checkpoint(load(tmp_path / "plain.ckpt"), tmp_path / "io.ckpt")

    made, expected = payloads_of(tmp_path / "out.ckpt"), payloads_of(tmp_path / "io.ckpt")
    assert list(made) == list(expected)
    assert all(same_parts(made[path], expected[path]) for path in expected)
    assert made["state_dict.first"] is made["state_dict.second"]
    assert abs((tmp_path / "out.ckpt").stat().st_size / (tmp_path / "io.ckpt").stat().st_size - 1) < 0.05

    after, reference = load(tmp_path / "out.ckpt"), load(tmp_path / "io.ckpt")
    sparse = [checkpoint["state_dict"].pop("sparse").coalesce() for checkpoint in (after, reference)]
    assert torch.equal(sparse[0].values(), sparse[1].values())
    assert_same(without_summary(after), without_summary(reference))
    assert_same_summary(after["q8lightning"], reference["q8lightning"])
    assert len(after["q8lightning"]["refused"]) == 2
    state = after["state_dict"]
    assert same_memory(state["first"], state["second"])
    assert same_memory(state["encoder"], state["decoder"])
    assert same_memory(state["left"], state["right"])
    assert isinstance(state["parameter"], nn.Parameter)
    assert after["hyper_parameters"] == {"width": 64, "names": ("a", "b"), "set": {1, 2}}

    run("decompress", tmp_path / "out.ckpt", tmp_path / "large.ckpt")
    undone = load(tmp_path / "large.ckpt")
    undone["state_dict"].pop("sparse")
    assert_same(undone, without_summary(reference))
    assert same_memory(undone["state_dict"]["first"], undone["state_dict"]["second"])


def test_tensors_keep_the_device_that_they_load_to(run: Run, plain: Path, preset: str, tmp_path: Path) -> None:
    """A checkpoint saved on a GPU is converted without one, and loads to the GPU afterwards."""
    torch.serialization.register_package(-5, lambda storage: "cuda:3", lambda storage, location: None)
    try:
        torch.save(load(plain), tmp_path / "gpu.ckpt")
    finally:
        torch.serialization._package_registry[:] = [
            entry for entry in torch.serialization._package_registry if entry[0] != -5
        ]
    run("compress", tmp_path / "gpu.ckpt", tmp_path / "small.ckpt", "--preset", preset)
    run("decompress", tmp_path / "small.ckpt", tmp_path / "large.ckpt")
    for name in ("small", "large"):
        assert set(open_checkpoint(tmp_path / f"{name}.ckpt").locations.values()) == {"cuda:3"}


# Files that are quantized already


def test_compressing_again_with_the_same_preset_is_nothing_to_do(
    run: Run, by_callback: Path, preset: str, tmp_path: Path
) -> None:
    done = run("compress", by_callback, tmp_path / "again.ckpt", "--preset", preset, "--keep", "state_dict.table")
    assert done.status == 1
    assert "nothing to compress: the 6 quantized tensors" in done.err
    assert names(tmp_path) == []


def test_resume_becomes_compact_and_never_the_other_way_round(run: Run, plain: Path, tmp_path: Path) -> None:
    run("compress", plain, tmp_path / "resume.ckpt")
    assert run("compress", tmp_path / "resume.ckpt", tmp_path / "compact.ckpt", "--preset", "compact").status == 0
    resume, compact = payloads_of(tmp_path / "resume.ckpt"), payloads_of(tmp_path / "compact.ckpt")
    expected = load(tmp_path / "resume.ckpt")
    QuantizedCheckpointIO(checkpoint="compact").save_checkpoint(expected, tmp_path / "io.ckpt")
    assert_same(without_summary(load(tmp_path / "compact.ckpt")), without_summary(load(tmp_path / "io.ckpt")))
    moment = "optimizer_states.0.state.0.exp_avg"
    assert (resume[moment].codec.label, compact[moment].codec.label) == ("softsign6", "softsign5")
    assert (tmp_path / "compact.ckpt").stat().st_size < (tmp_path / "io.ckpt").stat().st_size + 2048

    done = run("compress", tmp_path / "compact.ckpt", tmp_path / "back.ckpt", "--preset", "resume")
    assert done.status == 1
    assert "as small as the policy makes them" in done.err


def test_decompressing_a_plain_file_is_nothing_to_do(run: Run, plain: Path, tmp_path: Path) -> None:
    done = run("decompress", plain, tmp_path / "out.ckpt")
    assert done.status == 1
    assert "holds no quantized tensor" in done.err
    assert names(tmp_path) == []


def test_a_file_without_anything_to_quantize_is_refused(run: Run, tmp_path: Path) -> None:
    torch.save({"images": torch.randn(100, 100)}, tmp_path / "bare.pt")
    done = run("compress", tmp_path / "bare.pt", tmp_path / "out.ckpt")
    assert done.status == 1
    assert "the policy selects no tensor" in done.err
    assert "sections: images" in done.err
    assert names(tmp_path) == ["bare.pt"]


# Weights that are trained quantized


@pytest.mark.parametrize("codebook", ["linear", "int4"])
def test_codes_of_qat_survive_every_conversion(codebook: str, run: Run, tmp_path: Path) -> None:
    qat = QATConfig([WeightRule("*.weight", codebook=codebook, block_size=256)])
    trained = quiet_trainer(
        tmp_path, max_steps=3, limit_val_batches=0, callbacks=[QuantizationCallback(checkpoint=None, qat=qat)]
    )
    trained.fit(Autoencoder())
    trained.save_checkpoint(tmp_path / "plain.ckpt")
    run("compress", tmp_path / "plain.ckpt", tmp_path / "resume.ckpt")
    run("compress", tmp_path / "resume.ckpt", tmp_path / "compact.ckpt", "--preset", "compact")
    run("decompress", tmp_path / "resume.ckpt", tmp_path / "undone.ckpt")
    assert payloads_of(tmp_path / "compact.ckpt")["state_dict.decoder.weight"].codec.name == "softsign"
    exported = {}
    for name in ("plain", "resume", "compact", "undone"):
        export_quantized(tmp_path / f"{name}.ckpt", tmp_path / f"{name}.pt")
        exported[name] = load(tmp_path / f"{name}.pt")["state_dict"]
    for name in ("resume", "compact", "undone"):
        assert same_bits(exported[name]["decoder.weight"], exported["plain"]["decoder.weight"]), name
        assert same_bits(exported[name]["encoder.0.weight"], exported["plain"]["encoder.0.weight"]), name


# A policy of one's own


def test_a_policy_comes_from_a_file(run: Run, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(
        "rules:\n  - pattern: state_dict.encoder.*\n  - {pattern: state_dict.*, codec: softsign, block_size: 64}\n"
        "min_numel: 100\n"
    )
    assert run("compress", plain, tmp_path / "out.ckpt", "--policy", tmp_path / "policy.yaml").status == 0
    policy = CheckpointPolicy([Rule("state_dict.encoder.*"), Rule("state_dict.*", "softsign", 64)], min_numel=100)
    QuantizedCheckpointIO(checkpoint=policy).save_checkpoint(load(plain), tmp_path / "io.ckpt")
    assert set(payloads_of(tmp_path / "out.ckpt")) == {"state_dict.table", "state_dict.decoder.weight"}
    assert_same_content(tmp_path / "out.ckpt", tmp_path / "io.ckpt")


def test_rules_about_parameters_know_the_names_in_the_file(run: Run, tmp_path: Path) -> None:
    module = Autoencoder()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.named_parameters())  # type: ignore[method-assign]
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "named.ckpt")
    (tmp_path / "policy.yaml").write_text(
        "rules: [{pattern: 'optimizer_states.*.exp_avg', codec: softsign, parameter: 'decoder.*'}]\n"
    )
    run("compress", tmp_path / "named.ckpt", tmp_path / "out.ckpt", "--policy", tmp_path / "policy.yaml")
    assert list(payloads_of(tmp_path / "out.ckpt")) == ["optimizer_states.0.state.4.exp_avg"]


# What goes wrong


def test_damage_is_not_given_a_new_sum(run: Run, plain: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(plain.read_bytes())
    flip(damaged, place_of(damaged, load(plain)["state_dict"]["counts"]))
    done = run("compress", damaged, tmp_path / "out.ckpt")
    assert done.status == 1
    assert f"the tensor state_dict.counts in {damaged} is damaged" in done.err
    assert names(tmp_path) == ["damaged.ckpt"]


def test_a_damaged_payload_is_not_decompressed(run: Run, by_callback: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(by_callback.read_bytes())
    flip(damaged, place_of(damaged, payloads_of(by_callback)["state_dict.decoder.weight"].data))
    done = run("decompress", damaged, tmp_path / "out.ckpt")
    assert done.status == 1
    assert f"the tensor state_dict.decoder.weight in {damaged} is damaged" in done.err
    assert names(tmp_path) == ["damaged.ckpt"]


def test_a_model_that_diverged_does_not_fill_the_screen(run: Run, tmp_path: Path) -> None:
    def warn(event: str, _: Any) -> None:
        if event == "q8lightning.save":
            warnings.warn("somebody else's", ResourceWarning, stacklevel=2)

    state = {f"w{index}": torch.full((64, 64), torch.nan) for index in range(8)}
    torch.save({"state_dict": state | {"w": torch.randn(64, 64)}}, tmp_path / "plain.ckpt")
    with listening(warn):
        done = run("compress", tmp_path / "plain.ckpt", tmp_path / "out.ckpt")
    assert done.status == 0
    assert [line.split(" (")[0].rpartition(" ")[2] for line in done.err.splitlines()[:5]] == [
        f"state_dict.w{index}" for index in range(5)
    ]
    assert done.err.splitlines()[5:] == ["q8lightning: warning: 3 more of this kind"]


def test_the_moments_of_a_parameter_are_judged_with_its_own_options(run: Run, plain: Path, tmp_path: Path) -> None:
    """Whoever judges an update direction needs both moments and eps: the second parameter's hides what it loses."""
    checkpoint = load(plain)
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    first, *others = group["params"]
    groups = [{**group, "params": [first]}, {**group, "params": others, "eps": 1.0}]
    checkpoint["optimizer_states"][0]["param_groups"] = groups
    torch.save(checkpoint, tmp_path / "plain.ckpt")
    QuantizedCheckpointIO(checkpoint="resume").save_checkpoint(load(tmp_path / "plain.ckpt"), tmp_path / "io.ckpt")
    assert run("compress", tmp_path / "plain.ckpt", tmp_path / "out.ckpt").status == 0
    run("compress", plain, tmp_path / "same eps.ckpt")
    assert_same_content(tmp_path / "out.ckpt", tmp_path / "io.ckpt")
    errors = [load(tmp_path / name)["q8lightning"]["metrics"] for name in ("out.ckpt", "same eps.ckpt")]
    assert errors[0]["update_direction_error"] != pytest.approx(errors[1]["update_direction_error"], rel=0.01)


@pytest.mark.parametrize("limit", [0, 4096, 100_000])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(limit: int, run: Run, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "out.ckpt").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        done = run("compress", plain, tmp_path / "out.ckpt", "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.status == 1
    assert "out.ckpt: File too large" in done.err
    assert len(done.err.splitlines()) == 1
    assert (tmp_path / "out.ckpt").read_bytes() == b"old"
    assert names(tmp_path) == ["out.ckpt"]


def test_an_interruption_leaves_no_temporary_file(run: Run, plain: Path, tmp_path: Path, steps: Steps) -> None:
    steps.fail("written", "out.ckpt", KeyboardInterrupt())
    done = run("compress", plain, tmp_path / "out.ckpt")
    assert done.status == 130
    assert names(tmp_path) == []


def test_the_progress_ends_at_everything(plain: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    compress(plain, tmp_path / "a", progress=lambda *now: told.append(now))
    assert told[-1][0] == told[-1][1] > 0
    assert told == sorted(told)
    again: list[tuple[int, int]] = []
    decompress(tmp_path / "a", tmp_path / "b", progress=lambda *now: again.append(now))
    with keep_encoded():
        encoded = payloads_of(tmp_path / "a")
    assert again[-1] == (sum(4 * torch.Size(each.shape).numel() for each in encoded.values()),) * 2


def test_the_file_is_one_that_lightnings_own_door_reads(run: Run, plain: Path, tmp_path: Path) -> None:
    run("compress", plain, tmp_path / "out.ckpt")
    loaded = TorchCheckpointIO().load_checkpoint(tmp_path / "out.ckpt", weights_only=True)
    assert_same(loaded, load(tmp_path / "out.ckpt"))
    verified = QuantizedCheckpointIO().load_checkpoint(tmp_path / "out.ckpt", weights_only=True)
    assert_same(verified, loaded)
