"""Bit widths and the integer grids that the targets can run."""

import re
from dataclasses import dataclass
from typing import Literal

from clusterq_deploy.errors import ConfigError

MIN_BITS, MAX_BITS = 2, 8

ZERO_POINT = 128
"""What UINT8 adds to the integers of a signed grid."""

INT16_MAX = 2**15 - 1

Cpu = Literal["any", "vnni"]
"""The CPUs that ONNX Runtime's graph is for: any, or only those that add products of integers in 32 bits."""


@dataclass(frozen=True)
class Grid:
    """A symmetric integer grid: zero-point 0, values `low` to `high` times a positive scale.

    All of them fit INT8 except the unsigned one of 8 bits, which is UINT8. TensorRT has no UINT8: there a tensor on
    that grid uses every second value, `reduced`.
    """

    bits: int
    signed: bool

    @property
    def low(self) -> int:
        """The smallest integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def largest_stored(self) -> int:
        """The largest integer of an activation on this grid as UINT8, in which a signed grid has zero-point 128."""
        return self.high + (ZERO_POINT if self.signed else 0)

    @property
    def reduced(self) -> "Grid | None":
        """The grid for INT8, with twice the scale, if this one is too fine for it; else None."""
        return None if self.signed or self.bits < MAX_BITS else Grid(MAX_BITS - 1, signed=False)


def pair_limit(weights: Grid, activations: Grid) -> int | None:
    """Return the largest sum of two weights of one sign in a row whose products fit 16 bits together.

    x86 CPUs without VNNI multiply UINT8 activations by INT8 weights with `vpmaddubsw`, which adds two products in 16
    bits and saturates. Which two depends on the kernel, so the limit is for any two of an output channel. It is None
    if no two weights of the grid can pass it: if the weights or the activations have few bits.
    """
    limit = INT16_MAX // activations.largest_stored
    return None if 2 * -weights.low <= limit else limit


@dataclass(frozen=True, order=True)
class BitWidths:
    """Bits of weights and of activations; `str` returns the variant's name, such as w4a4."""

    weights: int
    activations: int

    def __post_init__(self) -> None:
        for bits in (self.weights, self.activations):
            if not MIN_BITS <= bits <= MAX_BITS:
                raise ConfigError(
                    f"bit widths go from {MIN_BITS} to {MAX_BITS}, got {self}; name them like w8a8 or w4a4"
                )

    def __str__(self) -> str:
        return f"w{self.weights}a{self.activations}"

    @classmethod
    def parse(cls, text: str) -> "BitWidths":
        """Read a name such as `w4a4`.

        Raises:
            ConfigError: the text is no such name, or a width is outside 2 to 8.
        """
        match = re.fullmatch(r"w(\d+)a(\d+)", text.strip().lower())
        if match is None:
            raise ConfigError(f"{text!r} is no bit-width setting; {_near(text)}name it like w8a8 or w4a4")
        return cls(int(match[1]), int(match[2]))


def _near(text: str) -> str:
    """Return a clause that offers the setting that was perhaps meant, or nothing: int8 is w8a8, a4w8 is w8a4."""
    numbers = re.findall(r"([a-z]*)\D*(\d+)", text.lower())
    if not 1 <= len(numbers) <= 2 or any(not MIN_BITS <= int(bits) <= MAX_BITS for _, bits in numbers):
        return ""
    (letter, weights), (_, activations) = numbers[0], numbers[-1]
    if len(numbers) == 2 and letter.startswith("a"):
        weights, activations = activations, weights
    return f"did you mean w{weights}a{activations}? "
