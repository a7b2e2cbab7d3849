"""Outputs of the program are the recorded ones, where they do not depend on the CPU."""

from __future__ import annotations

import json

import pytest

from tests import matrix

pytestmark = pytest.mark.full


def test_outputs_are_those_recorded() -> None:
    expected = matrix.portable(json.loads(matrix.RECORDING.read_text()))
    lines = matrix.differences(matrix.portable(matrix.record()), expected)
    assert not lines, "\n".join(lines)
