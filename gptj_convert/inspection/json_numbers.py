"""Numbers for JSON, which has no NaN and no infinity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def json_number(value: Any) -> float | str:
    """Return a value as JSON can hold it, with NaN and infinities as words."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def three_digits(values: Iterable[float]) -> list[float | str]:
    """Return figures to look at, in as few characters as possible."""
    return [json_number(float(f"{float(value):.3g}")) for value in values]
