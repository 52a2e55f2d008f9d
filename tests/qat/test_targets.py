"""The rules of each target are trained and exported to its format, without a word of the user about either."""

from pathlib import Path
from typing import get_args

import pytest
from support.exported import saved

from q8lightning import QATConfig, export_quantized
from q8lightning.qat.targets import Target


@pytest.mark.parametrize("target", get_args(Target))
def test_its_format_holds_what_is_trained_for_a_target(target: str, tmp_path: Path) -> None:
    format = next(each for each in ("bitsandbytes", "compressed-tensors", "gguf", "torchao") if target.startswith(each))
    pytest.importorskip(format.replace("-", "_"))
    pytest.importorskip("safetensors")
    config = QATConfig.for_target(target, transpose=["*.down.weight"])  # type: ignore[arg-type]
    source = saved(tmp_path, *config.weight_rules, checkpoint=None)
    floats = [] if format == "gguf" else ["*.embed.weight"]
    export_quantized(
        source.path,
        tmp_path / "out",
        format,
        prefix="net.",
        transpose=["*.down.weight"],
        as_floats=floats,  # type: ignore[arg-type]
    )
    assert (tmp_path / "out").exists()


def test_other_options_are_those_of_the_configuration() -> None:
    config = QATConfig.for_target("bitsandbytes-nf4", ["a.*", "b.*"], exclude=["*.c"], start_step=5)
    assert [rule.pattern for rule in config.weight_rules] == ["a.*", "b.*"]
    assert (config.exclude, config.start_step) == (("*.c",), 5)
    with pytest.raises(ValueError, match=r"target is one of .*, got 'gguf-q4'; did you mean 'gguf-q4_0'\?"):
        QATConfig.for_target("gguf-q4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"patterns is a list of patterns, got '\*'; write \['\*'\]"):
        QATConfig.for_target("gguf-q4_0", "*")
