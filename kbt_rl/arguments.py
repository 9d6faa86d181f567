"""Checks of plain arguments: what came, what was expected. Needs neither torch nor a simulator."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

_LONGEST = 120
MOST = 2**53  # what a float still counts one by one
_LARGEST_SEED = 2**32 - 1  # of NumPy's old generator, which SB3 seeds


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({type(value).__name__})"


def whole(name: str, value: Any, least: int = 0, expected: str = "", most: int = MOST) -> int:
    """A whole number, also where it came as a float or from NumPy.

    Args:
        name: Of the argument.
        value: What came.
        least: The smallest that makes sense.
        expected: What a number means here; for the message.
        most: The largest that makes sense.

    Raises:
        TypeError: It is no number.
        ValueError: It is not whole, too small or too large.
    """
    number = _real(name, value, expected or "expected a whole number")
    try:
        index = operator.index(number)
    except TypeError:
        if not (math.isfinite(number) and number == math.floor(number)):
            raise ValueError(f"{name} is {value}; {expected or 'expected a whole number'}") from None
        index = int(number)
    if index < least:
        raise ValueError(f"{name} is {value}; {expected or f'it must be at least {least}'}")
    if index > most:
        raise ValueError(f"{name} is {shown(value)}; it must be at most {most}")
    return index


def number(name: str, value: Any, expected: str = "expected a number") -> float:
    """A real number, NaN and infinities included.

    Raises:
        TypeError: It is none.
    """
    try:
        return float(_real(name, value, expected))
    except OverflowError:
        raise ValueError(f"{name} is {shown(value)}, more than a float can hold; {expected}") from None


def between(
    name: str, value: Any, low: float, high: float = math.inf, *, expected: str, open_low: bool = False
) -> float:
    """A finite number from ``low`` to ``high``; not ``low`` itself where that end is open.

    Raises:
        TypeError: It is no number.
        ValueError: It is outside, NaN or infinite.
    """
    found = number(name, value, expected)
    inside = (low < found if open_low else low <= found) and found <= high
    if not (inside and math.isfinite(found)):
        raise ValueError(f"{name} is {value}; {expected}")
    return found


def seed(name: str, value: Any) -> int | None:
    """A seed, or None for an arbitrary one.

    Raises:
        TypeError: It is no number.
        ValueError: It is not whole, negative or too large.
    """
    expected = "a whole number, not negative, or None"
    return None if value is None else whole(name, value, 0, expected, _LARGEST_SEED)


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of a few words.

    Raises:
        ValueError: It is another.
    """
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name} is {shown(value)}; choose {' or '.join(map(repr, choices))}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        TypeError: It is something else.
    """
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} is {shown(value)}; expected True or False")
    return bool(value)


def instance(name: str, value: Any, kind: type[Any], how: str = "") -> None:
    """Raise TypeError unless a value is of a class.

    Args:
        name: Of the argument.
        value: What came.
        kind: The class.
        how: How one gets such an object, for the message.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {shown(value)}; expected a {kind.__name__}{f': {how}' if how else ''}")


def is_flat(values: Any) -> bool:
    """Whether these are several values in a row: a list, a tuple or an array with one axis."""
    several = isinstance(values, Sequence) or hasattr(values, "__array__")
    return several and not isinstance(values, (str, bytes)) and getattr(values, "ndim", 1) == 1


def _real(name: str, value: Any, expected: str) -> Any:
    if type(value).__name__ in ("bool", "bool_") or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {shown(value)}; {expected}")
    return value
