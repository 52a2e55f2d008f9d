"""Codes with rounded scales, and with one scale for a long row, are those of the codec however a save encodes them."""

import pytest
import torch

from q8lightning import CheckpointPolicy, keep_encoded
from q8lightning.checkpoint.encode.checkpoint import encode_checkpoint
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.qat_codes import read_codes
from q8lightning.quantization.backends.choose import launching
from q8lightning.quantization.codecs.weight import WHOLE_ROW, WeightCodec

CODECS = {
    "flat": WeightCodec("int4 with float16 scales", 32),
    "rows": WeightCodec("normal_float4 with bfloat16 scales", 64, 0),
    "int8": WeightCodec("int8 with bfloat16 scales", 128, 0),
    "long": WeightCodec("int4 with float16 scales", WHOLE_ROW, 0).fitted((4, 5000)),
    "first_stage": WeightCodec("linear with float16 scales", 256),
}


@pytest.mark.parametrize("policy", ["resume", "compact"])
@pytest.mark.parametrize("launch", [False, True])
def test_a_save_stores_the_codes_of_the_codec(launch: bool, policy: str) -> None:
    torch.manual_seed(0)
    state = {name: torch.randn(4, 5000) if name == "long" else torch.randn(64, 128) for name in CODECS}
    names = ModelNames(parameters=frozenset(CODECS), quantized=CODECS)
    with launching(launch), keep_encoded():
        content = encode_checkpoint({"state_dict": state}, CheckpointPolicy.of(policy), names)
    for name, codec in CODECS.items():
        entry = content["q8lightning"]["qat"][name]
        assert "codes" in entry
        found, codes, scales, _ = read_codes(content["state_dict"][name], entry)
        assert found == codec
        expected_codes, expected_scales = codec.encode(state[name])
        assert torch.equal(codes, expected_codes), name
        assert torch.equal(scales, expected_scales), name
