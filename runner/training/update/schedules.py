"""The reference's learning-rate schedules as functions of the step.

Update s (the first is 1) uses the rate at t = s - 1. Rates are computed in float32 as in the
reference: at the end of a cosine the rounding of 1 + cos is a visible part of a small rate.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from runner.config import params as p

F32 = np.float32
Rate = Callable[[int], float]


def learning_rate(schedules: Sequence[p.Schedule], *, reset: bool = True) -> Rate:
    """Return the rate at step t of schedules that run one after the other.

    The last schedule never ends. A schedule counts from its own step 0 unless `reset` is off or it
    sets disable_lr_steps_reset itself.
    """
    begins = [0, *accumulate(_length(schedule) for schedule in schedules[:-1])]
    members = [_single(schedule) for schedule in schedules]
    offsets = [
        begin if reset and not schedule.disable_lr_steps_reset else 0
        for begin, schedule in zip(begins, schedules, strict=True)
    ]

    def rate(t: int) -> float:
        n = bisect_right(begins, t) - 1
        return members[n](t - offsets[n])

    return rate


def _length(schedule: p.Schedule) -> int:
    steps = schedule.steps
    if steps is None and isinstance(schedule, p.Cosine):
        steps = schedule.decay_steps
    assert steps is not None, "validated"
    return steps


def _single(s: p.Schedule) -> Rate:
    match s:
        case p.Constant():
            return lambda t: s.learning_rate
        case p.Linear():
            return lambda t: _polynomial(t, s, 1.0)
        case p.Polynomial():
            return lambda t: _polynomial(t, s, s.power)
        case p.Cosine():
            return lambda t: _cosine(t, s)
        case p.Exponential():
            return lambda t: _exponential(t, s)
        case p.PiecewiseConstant():
            return lambda t: _piecewise(t, s)


def _polynomial(t: int, s: p.Linear | p.Polynomial, power: float) -> float:
    # With `cycle` the decay stretches to the next multiple of `steps` instead of holding.
    span = s.steps * max(1, math.ceil(t / s.steps)) if s.cycle else s.steps
    left = 1 - F32(min(t, span)) / F32(span)
    initial, end = F32(s.initial_learning_rate), F32(s.end_learning_rate)
    return float((initial - end) * left ** F32(power) + end)


def _cosine(t: int, s: p.Cosine) -> float:
    fraction = F32(min(t, s.decay_steps)) / F32(s.decay_steps)
    half_wave = F32(0.5) * (1 + np.cos(F32(math.pi) * fraction))
    alpha = F32(s.alpha)
    return float(F32(s.initial_learning_rate) * ((1 - alpha) * half_wave + alpha))


def _exponential(t: int, s: p.Exponential) -> float:
    exponent = F32(t) / F32(s.decay_steps)
    if s.staircase:
        exponent = np.floor(exponent)
    return float(F32(s.initial_learning_rate) * F32(s.decay_rate) ** exponent)


def _piecewise(t: int, s: p.PiecewiseConstant) -> float:
    for boundary, value in zip(s.boundaries, s.values, strict=False):
        if t <= boundary:
            return value
    return s.values[-1]
