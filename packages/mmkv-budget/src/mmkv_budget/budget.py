"""How much one request may keep."""

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real

import torch
from torch import Tensor

from ._checks import int_row

_FINEST = 10**9  # denominators of ratios: a float's noise vanishes, and length * numerator stays within int64


@dataclass(frozen=True, slots=True)
class Budget:
    """KV pairs that a request keeps per KV head, protected ones included. Exactly one of the three is given.

    Attributes:
        tokens: KV pairs per KV head, >= 1.
        ratio: Share of the logical prompt length in (0, 1]; rounded down, at least one pair.
        bytes: Bytes per request (not per batch) for the prompt's part of the cache: keys and values as stored plus a
            4-byte slot for every kept pair, over all compressed layers and KV heads. Not counted: the tail of generated
            tokens, layers left uncompressed and the few bytes of segment bounds (8 (B H + 1) per layer).
    """

    tokens: int | None = None
    ratio: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuses anything but exactly one sensible number."""
        given = [name for name in ("tokens", "ratio", "bytes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a Budget takes exactly one of tokens, ratio and bytes, got {', '.join(given) or 'none'}")
        name = given[0]
        value = getattr(self, name)
        object.__setattr__(self, name, _ratio(value) if name == "ratio" else _positive(value, name))

    @classmethod
    def of(cls, value: "int | float | Budget") -> "Budget":
        """The budget a number means: an int is tokens (1 is one token), a float a ratio (1.0 is everything)."""
        if isinstance(value, Budget):
            return value
        given: object = value  # numpy's numbers count too
        if isinstance(given, Real) and not isinstance(value, bool):
            return cls(tokens=int(given)) if isinstance(given, Integral) else cls(ratio=float(given))
        raise TypeError(
            f"a budget is an int (tokens), a float in (0, 1] (share of the prompt) or a Budget, got {value!r}"
        )

    def per_head(self, lengths: Tensor, bytes_per_token: int) -> Tensor:
        """KV pairs kept per KV head, `[B]` int64; it may exceed the prompt, which then keeps everything.

        Args:
            lengths: `[B]` integer, logical prompt lengths: what the model was given, without padding.
            bytes_per_token: Bytes of one pair in every head: the sum over compressed layers and KV heads of
                (Dk + Dv) * itemsize + 4. Only read by a budget in bytes.
        """
        lengths = int_row(lengths, "lengths")
        if self.tokens is not None:
            return torch.full_like(lengths, self.tokens)
        if self.ratio is not None:
            # As a fraction: in floats 0.29 * 100 is 28.999..., one token less than asked for.
            share = Fraction(self.ratio).limit_denominator(_FINEST)
            return (lengths * share.numerator // share.denominator).clamp(min=1)
        assert self.bytes is not None
        return torch.full_like(lengths, _pairs(self.bytes, bytes_per_token))

    def __str__(self) -> str:
        """For reports: `64 tokens`, `10% of the prompt`, `1,048,576 bytes`."""
        if self.tokens is not None:
            return f"{self.tokens} token{'s' if self.tokens > 1 else ''}"
        return f"{100 * self.ratio:.10g}% of the prompt" if self.ratio is not None else f"{self.bytes:,} bytes"


def _positive(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"Budget({name}=...) must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"Budget({name}=...) must be at least 1, got {value}")
    return int(value)


def _ratio(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Budget(ratio=...) must be a float in (0, 1], got {value!r}")
    ratio = float(value)
    if math.isfinite(ratio) and ratio > 1:
        hint = f"; use the int {int(ratio)} for tokens" if ratio.is_integer() else "; use an int for tokens"
        raise ValueError(f"a float budget is the share of the prompt to keep, in (0, 1], got {value}{hint}")
    if not 0 < ratio <= 1:
        raise ValueError(f"a float budget is the share of the prompt to keep, in (0, 1], got {value}")
    return ratio


def _pairs(size: int, bytes_per_token: int) -> int:
    if isinstance(bytes_per_token, bool) or not isinstance(bytes_per_token, int) or bytes_per_token < 1:
        raise ValueError(f"bytes_per_token must be a positive int, got {bytes_per_token!r}")
    if size < bytes_per_token:
        raise ValueError(
            f"{size:,} bytes do not hold one KV pair in every head; the least that works is {bytes_per_token:,} bytes"
        )
    return size // bytes_per_token
