"""The operators behave as torch expects of operators, and the public functions keep their contract."""

import itertools
from collections.abc import Callable

import pytest
import torch
from support import oracle
from support.schemes import DTYPES, every_dtype
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from q8lightning.quantization import ops
from q8lightning.quantization.functional import (
    dequantize_blockwise,
    fake_quantize,
    fake_quantize_rows,
    quantize_blockwise,
)
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook, get_codebook
from q8lightning.quantization.spec.layout import check_block_size


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def arguments(x: Tensor, block_size: int = 32, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple]:
    """Each operator's name with arguments for a tensor like ``x``. The reference has encoded what is decoded."""
    codebook = get_codebook([-1.0, 0.0, 0.5, 1.0])
    return {
        "quantize": (x, "softsign", block_size),
        "dequantize": (*reference.quantize(x, codebook, block_size), codebook.spec, block_size, dtype),
        "fake_quantize": (x, "int4", block_size),
        "fake_quantize_rows": (x, "int4", x.shape[-1] if x.ndim else 1),
        "quantize_residual": (x, block_size, 8, 4),
        "dequantize_residual": (*residual_first(x, block_size), block_size, 8, 4, dtype),
        "quantize_log": (x.abs(), block_size, 5),
        "dequantize_log": (*reference.quantize_log(x.abs(), block_size, 5), block_size, 5, dtype),
        "quantize_affine": (x, block_size, 4),
        "dequantize_affine": (*reference.quantize_affine(x, block_size), block_size, dtype),
    }


def residual_first(x: Tensor, block_size: int) -> tuple[Tensor, ...]:
    """The results of the reference, each in memory of its own."""
    return tuple(part.clone() for part in reference.quantize_residual(x, block_size, 8, 4))


OPERATORS = [*arguments(random(4))]
MEASURED = [name for name in OPERATORS if not name.startswith("dequantize") and not name.endswith("rows")]
every_operator = pytest.mark.parametrize("name", OPERATORS)


def parts_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def test_every_operator_of_the_package_is_tested_here() -> None:
    registered = {name for name in dir(torch.ops.q8lightning) if not name.startswith("_")}
    defined = {getattr(ops, name)._qualname.split("::")[1] for name in OPERATORS}
    assert {name for name in registered if "quantize" in name} <= defined
    assert {value._qualname.split("::")[1] for value in vars(ops).values() if hasattr(value, "_qualname")} == defined


# What torch expects of an operator


@pytest.fixture
def _nothing_compiled_yet() -> None:
    torch._dynamo.reset()


@every_operator
@pytest.mark.parametrize("shape", [(3, 50), (1,), (0, 4)], ids=str)
def test_torch_accepts_the_operator(name: str, shape: tuple[int, ...]) -> None:
    torch.library.opcheck(getattr(ops, name), arguments(random(*shape))[name])


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("shape", [(3, 50), (0, 4)], ids=str)
def test_torch_accepts_the_operator_that_measures(name: str, shape: tuple[int, ...]) -> None:
    torch.library.opcheck(getattr(ops, name), arguments(random(*shape))[name], {"measure": True})


@pytest.mark.parametrize("name", MEASURED)
def test_measuring_changes_no_bit_of_the_result(name: str) -> None:
    given = arguments(random(5, 40))[name]
    *measured, statistics = getattr(ops, name)(*given, measure=True)
    *plain, nothing = getattr(ops, name)(*given)
    assert all(map(oracle.same_bits, measured, plain))
    assert (statistics.shape, nothing.shape) == ((5,), (0,))


def test_torch_accepts_the_operator_with_a_gradient() -> None:
    x = random(3, 50).requires_grad_()
    torch.library.opcheck(ops.fake_quantize, (x, "int4", 32), {"measure": True})
    torch.library.opcheck(ops.fake_quantize, (x, "int4", 32))
    torch.library.opcheck(ops.fake_quantize, (x, Codebook("mine", (-1.0, 0.0, 1.0)).spec, 32))


@every_operator
def test_it_returns_what_the_reference_returns(name: str) -> None:
    def codebook_of(argument: object) -> object:
        return get_codebook(argument) if isinstance(argument, str) else argument

    given = arguments(random(5, 40))[name]
    expected = parts_of(getattr(reference, name)(*map(codebook_of, given)))
    found = parts_of(getattr(ops, name)(*given))
    assert all(map(oracle.same_bits, found[: len(expected)], expected))
    assert [rest.numel() for rest in found[len(expected) :]] == [0] * (name in MEASURED)  # what was not measured


@every_operator
def test_a_fake_tensor_gets_the_shape_and_dtype_of_a_real_one(name: str) -> None:
    for shape, dtype in itertools.product(((7, 41), (64,), (), (0, 3)), DTYPES):
        given = arguments(random(*shape).to(dtype), dtype=dtype)[name]
        real = parts_of(getattr(ops, name)(*given))
        with FakeTensorMode() as mode:
            faked = (mode.from_tensor(value) if isinstance(value, Tensor) else value for value in given)
            fake = parts_of(getattr(ops, name)(*faked))
        for ours, theirs in zip(fake, real, strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


def test_more_than_2_to_31_elements_have_that_many_codes_and_blocks() -> None:
    numel = 2**32 + 5
    with FakeTensorMode():
        codes, scale, _ = ops.quantize(torch.empty(numel, dtype=torch.bfloat16), "linear", 256)
    assert codes.shape == (numel,)
    assert scale.shape == (2**24 + 1,)


@pytest.mark.usefixtures("_nothing_compiled_yet")
@every_operator
def test_it_compiles_without_a_graph_break(name: str) -> None:
    operator, (first, *rest) = getattr(ops, name), arguments(random(3, 50))[name]
    compiled = torch.compile(lambda first: operator(first, *rest), fullgraph=True, backend="aot_eager")
    assert all(map(oracle.same_bits, parts_of(compiled(first)), parts_of(operator(first, *rest))))


@pytest.mark.usefixtures("_nothing_compiled_yet")
@pytest.mark.parametrize("code", ["softsign", BUILTIN["int4"]], ids=["name", "codebook"])
def test_the_public_functions_compile_without_a_graph_break(code: str | Codebook) -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, absmax = quantize_blockwise(x, code, 64)
        return dequantize_blockwise(codes, absmax, code, 64, torch.float32), fake_quantize(x, code, 64)

    x = random(5, 50)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(map(oracle.same_bits, compiled(x), step(x)))


@pytest.mark.usefixtures("_nothing_compiled_yet")
def test_a_compiled_training_step_has_the_gradient_of_an_eager_one() -> None:
    other = random(50, 3)

    def loss(weight: Tensor) -> Tensor:
        return (fake_quantize(weight, "int4", 64) @ other).square().sum()

    weight, compiled = random(5, 50).requires_grad_(), torch.compile(loss, fullgraph=True, backend="aot_eager")
    (eager_gradient,) = torch.autograd.grad(loss(weight), weight)
    (compiled_gradient,) = torch.autograd.grad(compiled(weight), weight)
    assert oracle.same_bits(compiled_gradient, eager_gradient)


# quantize_blockwise and dequantize_blockwise


@every_dtype
@pytest.mark.parametrize("shape", [(1000,), (7, 13, 11), (1,), (), (0,)], ids=str)
def test_blockwise_quantization_is_that_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    A = random(*shape).to(dtype)
    out, absmax = quantize_blockwise(A, "dynamic", 64)
    codes, scale = reference.quantize(A, BUILTIN["dynamic"], 64)
    assert oracle.same_bits(out, codes)
    assert oracle.same_bits(absmax, scale)
    assert (out.dtype, absmax.dtype) == (torch.uint8, torch.float32)
    values = dequantize_blockwise(out, absmax, "dynamic", dtype=dtype)  # a block size of 64, as it always was
    assert values.dtype == dtype
    assert oracle.same_bits(values, reference.dequantize(codes, scale, BUILTIN["dynamic"], 64, dtype))


def test_given_buffers_are_written_and_returned() -> None:
    A = random(7, 30)
    expected_out, expected_absmax = quantize_blockwise(A, "linear", 32)
    out, absmax = torch.full((7, 30), 9, dtype=torch.uint8), torch.full((7,), torch.nan)
    returned = quantize_blockwise(A, "linear", 32, absmax=absmax, out=out)
    assert returned[0] is out
    assert returned[1] is absmax
    assert oracle.same_bits(out, expected_out)
    assert oracle.same_bits(absmax, expected_absmax)

    values = torch.full((7, 30), torch.nan, dtype=torch.bfloat16)
    assert dequantize_blockwise(out, absmax, "linear", 32, out=values) is values
    assert oracle.same_bits(values, dequantize_blockwise(out, absmax, "linear", 32, dtype=torch.bfloat16))
    assert dequantize_blockwise(out, absmax, "linear", 32, dtype=torch.bfloat16, out=values) is values


def test_a_buffer_may_have_strides() -> None:
    A, out = random(30, 7), torch.zeros(7, 30, dtype=torch.uint8).t()
    quantize_blockwise(A, "linear", 32, out=out)
    assert oracle.same_bits(out, quantize_blockwise(A, "linear", 32)[0])


def test_without_dtype_and_out_there_is_no_telling_what_to_return() -> None:
    codes, absmax = quantize_blockwise(random(64), "linear", 64)
    with pytest.raises(ValueError, match="dtype or an out tensor, got neither"):
        dequantize_blockwise(codes, absmax, "linear")


WRONG_FOR_QUANTIZE = {
    "out: shape": {"out": torch.zeros(64, dtype=torch.uint8)},
    "out: dtype": {"out": torch.zeros(2, 32, dtype=torch.int32)},
    "out: device": {"out": torch.zeros(2, 32, dtype=torch.uint8, device="meta")},
    "absmax: length": {"absmax": torch.zeros(3)},
    "absmax: shape": {"absmax": torch.zeros(2, 1)},
    "absmax: dtype": {"absmax": torch.zeros(2, dtype=torch.bfloat16)},
    "absmax: device": {"absmax": torch.zeros(2, device="meta")},
    "A: dtype": {"A": torch.zeros(2, 32, dtype=torch.int8)},
    "A: complex": {"A": torch.zeros(2, 32, dtype=torch.complex64)},
    "code: unknown": {"code": "int1"},
    "code: unsorted": {"code": [1.0, 0.0, -1.0]},
    "blocksize": {"blocksize": 100},
}


@pytest.mark.parametrize("wrong", WRONG_FOR_QUANTIZE)
def test_quantize_refuses_what_does_not_fit_before_anything_is_written(wrong: str) -> None:
    buffers = {"absmax": torch.full((2,), 7.0), "out": torch.full((2, 32), 7, dtype=torch.uint8)}
    given = {"A": random(2, 32), "code": "linear", "blocksize": 32} | buffers | WRONG_FOR_QUANTIZE[wrong]
    name = {"A": "A must be", "code": "codebook", "blocksize": "block_size"}.get(wrong.split(":")[0])
    with pytest.raises(ValueError, match=name or f"{wrong.split(':')[0]} must be .* got "):
        quantize_blockwise(**given)
    assert buffers["absmax"].tolist() == [7.0, 7.0]
    assert bool((buffers["out"] == 7).all())


WRONG_FOR_DEQUANTIZE = {
    "codes must be uint8": {"a": torch.zeros(2, 32, dtype=torch.int32)},
    "absmax must be .* shape \\[2\\]": {"absmax": torch.zeros(3)},
    "absmax must be .*float32": {"absmax": torch.zeros(2, dtype=torch.float64)},
    "absmax must be .* on cpu": {"absmax": torch.zeros(2, device="meta")},
    "out must be .* shape \\[2, 32\\]": {"out": torch.zeros(32, 2)},
    "out must be .*bfloat16": {"dtype": torch.bfloat16},  # while out is float32
    "the result must be float32": {"out": torch.zeros(2, 32, dtype=torch.int32)},
    "codebook": {"code": "int1"},
    "block_size": {"blocksize": 8192},
}


@pytest.mark.parametrize("message", WRONG_FOR_DEQUANTIZE)
def test_dequantize_refuses_what_does_not_fit_before_anything_is_written(message: str) -> None:
    codes, absmax = quantize_blockwise(random(2, 32), "linear", 32)
    out = torch.full((2, 32), 7.0)
    given = {"a": codes, "absmax": absmax, "code": "linear", "blocksize": 32, "out": out}
    with pytest.raises(ValueError, match=message):
        dequantize_blockwise(**given | WRONG_FOR_DEQUANTIZE[message])
    assert bool((out == 7.0).all())


def test_a_refused_dtype_is_named() -> None:
    codes, absmax = quantize_blockwise(random(2, 32), "linear", 32)
    with pytest.raises(ValueError, match=r"got torch\.int32"):
        dequantize_blockwise(codes, absmax, "linear", 32, dtype=torch.int32)


SAME_CODEBOOK = {
    "codebook": Codebook("mine", (-1.0, 0.0, 0.25, 1.0)),
    "spec": Codebook("mine", (-1.0, 0.0, 0.25, 1.0)).spec,
    "tensor": torch.tensor([-1.0, 0.0, 0.25, 1.0]),
    "float64 tensor": torch.tensor([-1.0, 0.0, 0.25, 1.0], dtype=torch.float64),
    "list": [-1.0, 0.0, 0.25, 1.0],
    "integers": [-1, 0, 0.25, 1],
    "tuple": (-1.0, 0.0, 0.25, 1.0),
}


@pytest.mark.parametrize("form", SAME_CODEBOOK)
def test_a_codebook_can_be_given_in_any_form(form: str) -> None:
    A, code = random(7, 30), SAME_CODEBOOK[form]
    out, absmax = quantize_blockwise(A, code, 32)
    codes, scale = reference.quantize(A, SAME_CODEBOOK["codebook"], 32)
    values = reference.dequantize(codes, scale, SAME_CODEBOOK["codebook"], 32, torch.float32)
    assert oracle.same_bits(out, codes)
    assert oracle.same_bits(absmax, scale)
    assert oracle.same_bits(dequantize_blockwise(out, absmax, code, 32, torch.float32), values)
    assert oracle.same_bits(fake_quantize(A, code, 32), values)


@pytest.mark.parametrize("name", [*BUILTIN])
def test_a_builtin_codebook_can_be_given_by_name(name: str) -> None:
    A = random(7, 30)
    by_name, by_value = quantize_blockwise(A, name, 32), quantize_blockwise(A, BUILTIN[name], 32)
    assert all(map(oracle.same_bits, by_name, by_value))


BLOCK_SIZES = {
    100: "power of two between 32 and 4096, got 100; try 128",
    16: "power of two between 32 and 4096, got 16; try 32",
    8192: "power of two between 32 and 4096, got 8192; try 4096",
    0: "power of two between 32 and 4096, got 0; try 32",
    -256: "power of two between 32 and 4096, got -256; try 32",
    2.0: r"an integer, got 2\.0",
    256.0: r"an integer, got 256\.0",
    True: "an integer, got True",
    "256": "an integer, got '256'",
    None: "an integer, got None",
}


@pytest.mark.parametrize(("block_size", "message"), BLOCK_SIZES.items(), ids=repr)
@pytest.mark.parametrize(
    "call",
    [
        lambda block_size: quantize_blockwise(random(64), "linear", block_size),
        lambda block_size: dequantize_blockwise(
            torch.zeros(64, dtype=torch.uint8), torch.ones(1), "linear", block_size, torch.float32
        ),
        lambda block_size: fake_quantize(random(64), "linear", block_size),
        check_block_size,
    ],
    ids=["quantize", "dequantize", "fake_quantize", "check"],
)
def test_a_block_size_that_is_none_is_refused(call: Callable, block_size: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"block_size must be (a )?{message}"):
        call(block_size)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_power_of_two_from_32_to_4096_is_a_block_size(block_size: int) -> None:
    assert check_block_size(block_size) == block_size
    assert quantize_blockwise(random(5000), "linear", block_size)[1].numel() == -(-5000 // block_size)


def test_the_codes_and_scales_of_a_parameter_hold_no_graph() -> None:
    parameter, absmax = torch.nn.Parameter(random(64)), torch.zeros(1)
    for part in (
        *quantize_blockwise(parameter, "linear", 64, absmax=absmax),
        *quantize_blockwise(parameter, "linear", 64),
    ):
        assert not part.requires_grad
    assert not absmax.requires_grad


# fake_quantize


@pytest.mark.parametrize("name", [*BUILTIN])
def test_fake_quantize_returns_what_would_be_decoded(name: str) -> None:
    for dtype in DTYPES:
        x = random(7, 30).to(dtype)
        codes, absmax = quantize_blockwise(x, name, 32)
        expected = dequantize_blockwise(codes, absmax, name, 32, dtype)
        assert oracle.same_bits(fake_quantize(x, name, 32), expected)


def test_the_gradient_of_fake_quantize_is_the_identity() -> None:
    def straight_through(x: Tensor) -> Tensor:  # equal to x, by way of the operator's gradient only
        return fake_quantize(x, "int4", 32) - fake_quantize(x.detach(), "int4", 32) + x.detach()

    x = random(5, 13).double().requires_grad_()
    assert torch.autograd.gradcheck(straight_through, x)
    assert torch.autograd.gradgradcheck(straight_through, x)


@every_dtype
def test_the_gradient_of_fake_quantize_arrives_bit_for_bit(dtype: torch.dtype) -> None:
    x = random(7, 30).to(dtype).requires_grad_()
    gradient = random(30, 7).to(dtype).t()
    fake_quantize(x, "softsign", 32).backward(gradient)
    assert x.grad is not None
    assert oracle.same_bits(x.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_fake_quantize_refuses_what_is_no_float(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="x must be float32, float16, bfloat16 or float64, got torch"):
        fake_quantize(torch.zeros(64).to(dtype), "linear", 32)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_codecs_do_not_depend_on_the_default_dtype(default: torch.dtype) -> None:
    """Lightning changes it within forward under ``64-true`` and ``bf16-true``."""

    def results() -> list[Tensor]:
        torch.manual_seed(0)
        x = torch.randn(700, dtype=torch.float32)
        parts = [ops.quantize(x, "dynamic", 64), ops.quantize_log(x.abs(), 64, 8), ops.quantize_affine(x, 64)]
        parts += [
            ops.quantize_residual(x, 64, 8, 8),
            (fake_quantize(x, "int4", 64), fake_quantize_rows(x, "linear")),
        ]
        parts += [reference.quantize(x, BUILTIN["softsign"], 64), (reference.fake_quantize(x, BUILTIN["int4"], 64),)]
        return [tensor for group in parts for tensor in group]

    expected = results()
    torch.set_default_dtype(default)
    try:
        got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(got, expected, strict=True):
        assert oracle.same_bits(one, other)


# fake_quantize_rows


@pytest.mark.parametrize("row", [1, 31, 64, 100, 4097])
def test_each_vector_along_the_last_axis_has_its_own_scale(row: int) -> None:
    x = random(3, 2, row)
    values = fake_quantize_rows(x, "linear")
    for one, other in zip(values.view(-1, row), x.view(-1, row), strict=True):
        assert oracle.same_bits(one, reference.fake_quantize(other, BUILTIN["linear"], row))
    assert oracle.same_bits(values.abs().amax(-1), x.abs().amax(-1))


def test_one_scale_for_all() -> None:
    x = random(30, 200)
    assert oracle.same_bits(fake_quantize_rows(x, "int4", True), reference.fake_quantize(x, BUILTIN["int4"], 6000))


def test_the_gradient_of_fake_quantize_rows_is_the_identity() -> None:
    x, gradient = random(7, 33).requires_grad_(), random(7, 33)
    fake_quantize_rows(x, "linear").backward(gradient)
    assert oracle.same_bits(x.grad, gradient)
