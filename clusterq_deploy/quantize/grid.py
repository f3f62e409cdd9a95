"""Bit widths and the integer grids that the targets can run."""

import re
from dataclasses import dataclass

from clusterq_deploy.errors import ConfigError

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Grid:
    """A symmetric integer grid: zero-point 0, values `low` to `high` times a positive scale.

    INT8 has room for all of them but the unsigned one of 8 bits, which is UINT8. TensorRT has no UINT8: there a tensor
    of that grid has every second value of it, `halved`.
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
    def halved(self) -> "Grid | None":
        """The grid for INT8, whose scale is twice as large, where this one is too fine for it; else None."""
        return None if self.signed or self.bits < MAX_BITS else Grid(MAX_BITS - 1, signed=False)


@dataclass(frozen=True, order=True)
class BitWidths:
    """Bits of weights and of activations; `str` gives the variant's name, such as w4a4."""

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
            raise ConfigError(f"{text!r} is no bit-width setting; name it like w8a8 or w4a4")
        return cls(int(match[1]), int(match[2]))
