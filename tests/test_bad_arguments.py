"""What users write wrong ends in one message: the rule, what was given, and what to write instead.

Rules, configurations, the callback, the CheckpointIO and the functions share the checks, so one table tests them. Each
call is Python as a user may type it.
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import q8lightning
from q8lightning import QuantizationCallback, Rule, ToolError, WeightRule, tools
from q8lightning.metrics import UpdateDirectionError

NAMES: dict[str, Any] = {name: getattr(q8lightning, name) for name in q8lightning.__all__} | {
    "UpdateDirectionError": UpdateDirectionError, "np": np, "q8lightning": q8lightning, "torch": torch,
}  # fmt: skip

EMPTY = "is a pattern over names, got '', which matches nothing; write '\\*' for all"
NO_PATTERN = "is a pattern over names, got {}; write such as"
NO_LIST = "is a list of patterns, got {}; write"
BOOL = "{0} is True or False, got {1}; write {0}=True or {0}=False"
A, W = 'Rule("a", "linear", ', 'WeightRule("*", "int4", '
RULES = 'CheckpointPolicy([Rule("a", "softsign")], '
QAT = "QATConfig([WeightRule()], "

WRONG: dict[str, str] = {
    # Bits without a codec, and values that count as none
    'Rule("a", bits=4)': "bits and residual_bits are a codec's, got codec=None, bits=4 .* name a codec, such as",
    'Rule("a", residual_bits=4)': "are a codec's, got codec=None, bits=None and residual_bits=4; name a codec",
    'Rule("a", scale_dtype="bfloat16")': "scale_dtype is a codec's, got codec=None and scale_dtype='bfloat16'; name a",
    'Rule("a", "log", scale_dtype="float16")': "is float32 or bfloat16, .* got 'float16'; try 'bfloat16'",
    'Rule("a", "log", scale_dtype=16)': "is float32 or bfloat16, .* got 16; try 'bfloat16'",
    'Rule("a", block_size=7)': "block_size must be a power of two .* got 7; try 32",
    'Rule("a", block_size="256")': "block_size must be an integer, got '256'; write 256",
    A + "residual_bits=False)": "residual_bits is 0 .* or an integer from 2 to 8, got False; write 0, or such as 4",
    A + "residual_bits=True)": "residual_bits is 0 .* got True; write 0, or such as 4",
    A + "residual_bits=None)": "residual_bits is 0 .* got None; write 0, or such as 4",
    A + "residual_bits=1)": "residual_bits must be an integer from 2 to 8, got 1; try 6",
    A + "residual_bits=np.int64(4))": r"residual_bits is 0 .* got np\.int64\(4\); write 4",
    A + "bits=np.int64(4))": r"bits must be an integer from 2 to 8, got np\.int64\(4\); write 4",
    A + "bits=4.0)": r"bits must be an integer from 2 to 8, got 4\.0; write 4",
    A + "bits='4')": "bits must be an integer from 2 to 8, got '4'; write 4",
    A + "bits=True)": "bits must be an integer from 2 to 8, got True; try 6",
    A + "block_size=np.int64(128))": r"block_size must be an integer, got np\.int64\(128\); write 128",
    A + "block_size=True)": "block_size must be an integer, got True; try 256",
    'Rule("", "linear")': "rule for '': pattern " + EMPTY,
    'Rule(3, "linear")': "rule for 3: pattern " + NO_PATTERN.format(3),
    A + 'parameter="")': "rule for 'a': parameter " + EMPTY,
    A + "parameter=None)": "parameter " + NO_PATTERN.format(None),
    'Rule("a", "softsgn")': "unknown codec: .* got 'softsgn'; did you mean 'softsign'",
    'Rule("a", "")': "unknown codec: .* got ''",
    'Rule("a", 8)': r"codebook is a name, .* got 8; write such as 'linear' or \[-1\.0, 0\.0, 1\.0\]",
    'Rule("a", True)': "codebook is a name, .* got True; write such as",
    RULES + 'min_numel="7")': "min_numel must be an integer of at least 1, got '7'; write 7",
    RULES + "min_numel=True)": "min_numel must be an integer of at least 1, got True; the default is 4096",
    RULES + "min_numel=1.5)": r"min_numel must be an integer of at least 1, got 1\.5; the default is 4096",
    RULES + "min_numel=np.int64(7))": r"min_numel must be an integer .* got np\.int64\(7\); write 7",
    RULES + "min_numel=0)": "min_numel must be an integer of at least 1, got 0; the default is 4096",
    # QAT
    'WeightRule("")': "weight rule for '': pattern " + EMPTY,
    "WeightRule(None)": "weight rule for None: pattern is of type str, got None",
    'WeightRule("*", None, 7)': "block_size must be a power of two .* got 7; try 32",
    'WeightRule("*", None, scale_dtype="half")': "scale_dtype is one of float32, float16, bfloat16, got 'half'",
    W + "axis=np.int64(0))": r"axis is of type int \| None, got np\.int64\(0\); write 0",
    W + "axis='0')": "axis is of type .* got '0'; write 0",
    W + "block_size=64.0)": r"block_size must be an integer, got 64\.0; write 64",
    'ActivationRule("")': "pattern " + EMPTY,
    'FreezeRule("", 1)': "pattern " + EMPTY,
    'FreezeRule("a", np.int64(3))': r"step is of type int, got np\.int64\(3\); write 3",
    'FreezeRule("a", 1.0)': r"step is of type int, got 1\.0; write 1",
    QAT + 'exclude=[""])': r"exclude\[0\] " + EMPTY,
    QAT + "exclude=[3])": r"exclude\[0\] " + NO_PATTERN.format(3),
    QAT + "exclude=None)": "exclude " + NO_LIST.format(None),
    QAT + 'exclude="a")': r"exclude is a list of patterns, got 'a'; write \['a'\]",
    QAT + "exclude={'a': 1})": "exclude " + NO_LIST.format("{'a': 1}"),
    QAT + "min_rank=-1)": "min_rank must be an integer of at least 0, got -1; write 0 to quantize parameters of every",
    QAT + 'start_step="9")': "start_step is of type int, got '9'; write 9",
    QAT + "start_step=1e3)": r"start_step is of type int, got 1000\.0; write 1000",
    QAT + "exclude_first_and_last=1)": "exclude_first_and_last is of type bool, got 1; write True or False",
    'QATConfig.for_target("gguf-q4_0", None)': "patterns " + NO_LIST.format(None),
    'QATConfig.for_target("gguf-q4_0", [""])': r"patterns\[0\] " + EMPTY,
    'QATConfig.for_target("gguf-q4_0", weights=[])': r"the target decides the rules for weights, got weights=\[\]",
    # The callback and the CheckpointIO
    'QuantizationCallback(async_save="no")': BOOL.format("async_save", "'no'"),
    "QuantizationCallback(async_save=1)": BOOL.format("async_save", "1"),
    "QuantizationCallback(verify=None)": BOOL.format("verify", "None"),
    'QuantizedCheckpointIO(async_save="yes")': BOOL.format("async_save", "'yes'"),
    "QuantizedCheckpointIO(verify=0)": BOOL.format("verify", "0"),
    # Functions over tensors
    "quantize_blockwise([1.0], 'linear', 32)": r"A must be a torch\.Tensor, got list; convert it with torch\.as_tensor",
    "quantize_blockwise(torch.rand(64).to_sparse(), 'linear', 32)": r"A must be a dense tensor, got the layout",
    "quantize_blockwise(torch.rand(64), 'linear', np.int64(32))": r"block_size must be .* np\.int64\(32\); write 32",
    "quantize_blockwise(torch.rand(64), 'linear', 32, out=[1])": r"out must be a torch\.Tensor, got list",
    "q8lightning.dequantize_blockwise(torch.zeros(64).byte(), torch.ones(2), 'linear', 32, 'float32')": (
        r"the dtype of the result is a torch\.dtype, got 'float32'; pass such as torch\.float32"
    ),
    "fake_quantize(torch.rand(64), 'int4', 32, 1)": BOOL.format("return_statistics", "1"),
    "Codebook(3, [0.0, 1.0])": "a codebook's name is a word, got 3; write such as 'mine'",
    "Codebook('', [0.0, 1.0])": "a codebook's name is a word, got ''",
    "Codebook('a', 'abc')": "codebook levels are numbers, got 'abc'; write such as",
    "Codebook('a', None)": "codebook levels are numbers, got None; write such as",
    "UpdateDirectionError('a')": "eps must be finite and at least 0, got 'a'; pass the eps of the optimizer",
    "UpdateDirectionError(True)": "eps must be finite and at least 0, got True",
    # Functions over files, which refuse before they read or write
    "tools.inspect('small.ckpt', trust='no')": BOOL.format("trust", "'no'"),
    "tools.verify('small.ckpt', trust=1)": BOOL.format("trust", "1"),
    "tools.compare('small.ckpt', 'small.ckpt', trust='no')": BOOL.format("trust", "'no'"),
    "tools.compress('plain.ckpt', 'small.ckpt', overwrite='no')": BOOL.format("overwrite", "'no'"),
    "tools.compress('plain.ckpt', 'new.ckpt', keep='a')": r"keep is a list of patterns, got 'a'; write \['a'\]",
    "tools.compress('plain.ckpt', 'new.ckpt', keep=[''])": r"keep\[0\] " + EMPTY,
    "tools.compress('plain.ckpt', 'new.ckpt', {'rule': []})": "the policy has the key 'rule' .* did you mean 'rules'",
    "tools.compress('plain.ckpt', 'new.ckpt', {})": r"the policy needs the key 'rules', got \{\}; add it",
    "tools.decompress('small.ckpt', 'plain.ckpt', overwrite=1)": BOOL.format("overwrite", "1"),
    "tools.decompress('small.ckpt', 'new.ckpt', trust='no')": BOOL.format("trust", "'no'"),
    "q8lightning.load('small.ckpt', verify='no')": BOOL.format("verify", "'no'"),
    "q8lightning.load('small.ckpt', trust='no')": BOOL.format("trust", "'no'"),
    "q8lightning.save({'a': torch.rand(64)}, 'new.ckpt', keep='a')": r"keep is .* write \['a'\]",
    "export_quantized('small.ckpt', 'new.ckpt', weights_only='no')": BOOL.format("weights_only", "'no'"),
    "export_quantized('small.ckpt', 'new.ckpt', round_scales=1)": BOOL.format("round_scales", "1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    torch.save({"state_dict": {"a": torch.rand(64, 128)}}, path / "plain.ckpt")
    tools.compress(path / "plain.ckpt", path / "small.ckpt", "compact")
    return path


@pytest.mark.parametrize("call", WRONG)
def test_a_wrong_value_is_refused_with_what_to_write(call: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=WRONG[call]):
        eval(call, dict(NAMES))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


UNKNOWN = {
    'Rule("a", "linear", residual=True)': "Rule has no argument 'residual', got residual=True; .* mean 'residual_bits'",
    'Rule("a", codebook="linear")': "Rule has no argument 'codebook', .* its arguments are pattern, codec, block_size",
    'WeightRule("a", codec="int4")': "WeightRule has no argument 'codec', .* did you mean 'codebook'",
    'WeightRule("a", "int4", blocksize=32)': "did you mean 'block_size'",
    'ActivationRule("a", pre="token")': "did you mean 'per'",
    'FreezeRule("a", steps=3)': "did you mean 'step'",
    "QATConfig([WeightRule()], rampe=3)": "QATConfig has no argument 'rampe', got rampe=3; .* did you mean 'ramp'",
    'QATConfig.for_target("gguf-q4_0", excluded=["a"])': "did you mean 'exclude'",
    'CheckpointPolicy([Rule("a", "linear")], min_sqnr=3)': "did you mean 'min_sqnr_db'",
    "QuantizationCallback(checkpoints=3)": "QuantizationCallback has no argument .* did you mean 'checkpoint'",
    "QuantizedCheckpointIO(async_saves=True)": "did you mean 'async_save'",
}


@pytest.mark.parametrize("call", UNKNOWN)
def test_an_unknown_argument_is_refused_with_the_one_that_is_meant(call: str) -> None:
    with pytest.raises(TypeError, match=UNKNOWN[call]):
        eval(call, dict(NAMES))


def test_what_names_its_arguments_is_otherwise_as_it_was() -> None:
    rule = WeightRule("*.weight", "int4", block_size=64)
    for again in (pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule), eval(repr(rule), dict(NAMES))):
        assert again == rule
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'pattern'"):
        Rule()  # type: ignore[call-arg]

    class Mine(QuantizationCallback):
        def __init__(self, extra: int, **others: Any) -> None:
            super().__init__(**others)
            self.extra = extra

    assert Mine(3, async_save=True).async_save
    with pytest.raises(TypeError, match=r"QuantizationCallback has no argument 'verfy'.*did you mean 'verify'"):
        Mine(3, verfy=True)


@pytest.mark.parametrize("function", [tools.inspect, tools.verify, q8lightning.load], ids=lambda each: each.__name__)
def test_an_empty_name_is_not_the_current_folder(function: Any) -> None:
    with pytest.raises(ToolError, match="the name of the checkpoint is empty; name a file, or a folder with shards"):
        function("")
