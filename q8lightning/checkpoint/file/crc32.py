"""Combine the CRC32 of stretches, which several threads can compute, to that of the whole."""

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320
"""The one of the CRC32 of zip files. Bit 31 is the constant term."""

_ONE = 1 << 31


def combine(first: int, second: int, length: int) -> int:
    """Return the CRC32 of two stretches one after the other.

    Args:
        first: The sum of the first stretch (``zlib.crc32``).
        second: The sum of the second.
        length: Bytes of the second.

    Example:
        >>> import zlib
        >>> combine(zlib.crc32(b"check"), zlib.crc32(b"point"), 5) == zlib.crc32(b"checkpoint")
        True
    """
    return _multiply(_shift(length), first) ^ second


@lru_cache(maxsize=64)
def _shift(length: int) -> int:
    """Return ``x ** (8 * length)``, by which a sum is multiplied when so many bytes follow."""
    power, square = _ONE, _ONE >> 8
    while length:
        if length & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        length >>= 1
    return power


def _multiply(a: int, b: int) -> int:
    """Multiply two polynomials over GF(2), modulo the one of CRC32."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product
