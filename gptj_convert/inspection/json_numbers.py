"""Numbers as JSON can hold them: it has no NaN and no infinity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def json_number(value: Any) -> float | str:
    """A value as JSON can have it: NaN and infinities as words."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def three_digits(values: Iterable[float]) -> list[float | str]:
    """Figures to be looked at, in as few letters as that takes."""
    return [json_number(float(f"{float(value):.3g}")) for value in values]
