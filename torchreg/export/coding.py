"""Arrays without their zeros: the other values, and where they stand, as a bitmask or as the gaps between them.

A zero is the bit pattern of zeros only: -0.0 is a value like any other. A gap is the number of zeros before a value;
the last one counts those behind the last value, so that the gaps also say how long the array is. Written in symbols of
4, 8 or 16 bits, the largest symbol, E, stands for E zeros with no value behind them: a gap g becomes g // E times E,
and then g mod E. Of a share d of values, gaps cost 4 to 5 bits a value around d = 0.1 (where no code needs fewer than
4.7), a bitmask 1/d.

Gaps with a largest symbol are those of Han, Mao and Dally, "Deep Compression", ICLR 2016, who write a value of zero
behind a full gap where nothing is written here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BITMASK = "bitmask"
GAP_BITS = {"gaps4": 4, "gaps8": 8, "gaps16": 16}
CODINGS = (BITMASK, *GAP_BITS)

# Of an array's bytes to those of its code. Only gaps of 16 bits between very few values could go beyond.
LARGEST_EXPANSION = 4096


class Coded(NamedTuple):
    """An array without its zeros: the coding's name, the values, and where they stand (uint8; uint16 for gaps16)."""

    coding: str
    values: NDArray[Any]
    places: NDArray[Any]


def shortest(array: NDArray[Any]) -> Coded | None:
    """The array of unsigned integers in the shortest coding, or None if none is shorter than the array itself.

    >>> coded = shortest(np.array([0, 0, 0, 7, 0, 0, 0, 0, 0, 9] + 10 * [0], dtype=np.uint32))
    >>> coded.coding, coded.values.tolist(), coded.places.tolist()  # gaps 3, 5, 10 in halves of bytes, and a filler
    ('gaps4', [7, 9], [83, 250])
    """
    nonzero = array != 0
    count = int(np.count_nonzero(nonzero))
    gaps = np.empty(0, dtype=np.int64)
    sizes = {BITMASK: -(-array.size // 8)}
    if 4 * count <= array.size:  # else even gaps of 4 bits take more than a bitmask
        gaps = np.diff(np.flatnonzero(nonzero), prepend=-1, append=array.size) - 1
        for coding, bits in GAP_BITS.items():
            symbols = gaps.size + int((gaps // (2**bits - 1)).sum())
            size = -(-symbols * bits // 8)
            if array.nbytes <= LARGEST_EXPANSION * (count * array.itemsize + size):
                sizes[coding] = size
    coding = min(sizes, key=sizes.__getitem__)
    if count * array.itemsize + sizes[coding] >= array.nbytes:
        return None
    places = np.packbits(nonzero, bitorder="little") if coding == BITMASK else _packed_gaps(gaps, GAP_BITS[coding])
    return Coded(coding, array[nonzero], places)


def positions(coding: str, places: NDArray[Any], count: int, size: int) -> NDArray[Any]:
    """Where the ``count`` values stand in an array of ``size`` elements: indices, or a mask of bools.

    Memory is taken in proportion to ``places``, whatever ``size`` claims.

    Raises:
        ValueError: if the places are not those of as many values in an array of that size.

    >>> positions("gaps4", np.array([83, 250], dtype=np.uint8), count=2, size=20).tolist()
    [3, 9]
    """
    if coding == BITMASK:
        return _unpacked_bitmask(places, count, size)
    return _summed_gaps(places, GAP_BITS[coding], count, size)


def _packed_gaps(gaps: NDArray[np.int64], bits: int) -> NDArray[Any]:
    full = 2**bits - 1
    repeats = gaps // full
    ends = np.cumsum(repeats + 1) - 1
    length = int(ends[-1]) + 1
    symbols = np.full(length + (length % 2 if bits == 4 else 0), full, dtype=np.uint16 if bits == 16 else np.uint8)
    symbols[ends] = gaps - repeats * full
    return symbols[0::2] | np.left_shift(symbols[1::2], 4) if bits == 4 else symbols


def _summed_gaps(places: NDArray[Any], bits: int, count: int, size: int) -> NDArray[np.int64]:
    full = 2**bits - 1
    symbols = places
    if bits == 4:
        symbols = np.empty(2 * places.size, dtype=np.uint8)
        symbols[0::2] = places & 15
        symbols[1::2] = places >> 4
        if symbols.size and symbols[-1] == full:  # fills the last byte
            symbols = symbols[:-1]
    ends = symbols != full
    if not (symbols.size and ends[-1]):
        raise ValueError("its gaps have no end")
    after = np.cumsum(symbols + ends.astype(np.int64))[ends]
    if after.size != count + 1:
        raise ValueError(f"its gaps are those of {after.size - 1} values, and it has {count}")
    if after[-1] != size + 1:
        raise ValueError(f"its gaps are those of {after[-1] - 1} elements, and its shape has {size}")
    return after[:-1] - 1


def _unpacked_bitmask(places: NDArray[Any], count: int, size: int) -> NDArray[np.bool_]:
    if places.size != -(-size // 8):
        raise ValueError(f"its bitmask has {8 * places.size} bits, and its shape {size} elements")
    bits = np.unpackbits(places, bitorder="little")
    mask, rest = bits[:size], bits[size:]
    marked = int(np.count_nonzero(mask))
    if rest.any() or marked != count:
        raise ValueError(f"its bitmask marks {marked + int(rest.sum())} values, and it has {count}")
    return mask.view(np.bool_)
