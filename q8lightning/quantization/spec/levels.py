"""The published levels of the built-in codebooks."""

import math

import torch


def dynamic_levels(signed: bool) -> tuple[float, ...]:
    """Return the dynamic map of Dettmers, 8-Bit Approximations for Parallelism in Deep Learning (arXiv:1511.04561)."""
    # Steps in float32, added up from the nearer end with one rounding each, give the very bits of bitsandbytes' map.
    start, end = torch.tensor([0.1, 1.0], dtype=torch.float32, device="cpu")
    positive: list[float] = []
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        step = ((end - start) / parts).double()
        j = torch.arange(parts + 1, dtype=torch.float64, device="cpu")
        boundaries = torch.where(j < (parts + 1) // 2, start.double() + step * j, end - step * (parts - j)).float()
        positive += (
            (boundaries[:-1] + boundaries[1:]) / 2 * torch.tensor(10.0 ** (i - 6), dtype=torch.float32, device="cpu")
        ).tolist()
    return (*(-x for x in reversed(positive) if signed), 0.0, *positive, 1.0)


def normal_float4_levels() -> tuple[float, ...]:
    """Return the NF4 of QLoRA (arXiv:2305.14314): normal quantiles, 8 positive and 7 negative, scaled to [-1, 1].

    They are the float32 values that bitsandbytes publishes, which rounded on the way, so that its kernels return the
    very weights that were trained. Computed in float64, 12 of them differ in the last bits (by up to 1.8e-7).
    """
    return (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip


def integer_levels(bits: int) -> tuple[float, ...]:
    """Return the integers of two's complement, ``-2**(bits-1) .. 2**(bits-1) - 1``, divided by ``2**(bits-1)``."""
    half = 2 ** (bits - 1)
    return tuple(k / half for k in range(-half, half))


def float8_levels(exponent_bits: int, mantissa_bits: int, finite_only: bool) -> tuple[float, ...]:
    """Return the finite values of an OCP 8-bit float (arXiv:2209.05433), divided by the largest one."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = set()
    for pattern in range(128):
        exponent, mantissa = pattern >> mantissa_bits, pattern & (2**mantissa_bits - 1)
        if exponent == 2**exponent_bits - 1 and (not finite_only or mantissa == 2**mantissa_bits - 1):
            continue  # infinity or NaN; e4m3fn has finite values under the top exponent, all but one pattern
        lead = mantissa / 2**mantissa_bits + (exponent > 0)
        values.add(math.ldexp(lead, max(exponent, 1) - bias))
    largest = max(values)
    return tuple(sorted({sign * value / largest for value in values for sign in (-1.0, 1.0)}))
