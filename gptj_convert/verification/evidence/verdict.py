"""The verdict of a verification, filled level by level."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from gptj_convert.options import DEFAULT_LEVEL, LEVELS
from gptj_model.tensors import Tensor


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which the two sides differ."""

    level: str
    found: str
    expected: str
    tensor: dict[str, str] | None = None
    """Names of the tensor: {hf, tf, cs}."""
    block: int | None = None
    operation: str | None = None
    """Operation of the block, by `gptj_model.network.observation`; outside the blocks embedding,
    ln_f or lm_head."""
    prompt: str | None = None
    file: str | None = None
    diagnosis: str | None = None
    """What may have happened, where that was found out."""

    @property
    def place(self) -> str:
        """Place in words."""
        if self.tensor:
            return f"tensor {self.tensor['hf']} ({self.tensor['tf']})"
        if self.file:
            return f"file {self.file}"
        if self.prompt is not None:
            block = None if self.block is None else f"block {self.block}"
            at = ", ".join(filter(None, (block, self.operation)))
            return f"prompt {self.prompt!r}, first in {at}" if at else f"prompt {self.prompt!r}"
        return "the checkpoint"


@dataclass(slots=True)
class LevelResult:
    """Outcome of one level."""

    ok: bool
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Verdict:
    """Outcome of a verification, filled level by level."""

    tolerance: float
    asked: tuple[str, ...] = LEVELS[: LEVELS.index(DEFAULT_LEVEL) + 1]
    """Levels to run."""
    levels: dict[str, LevelResult] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    diagnosis: list[str] = field(default_factory=list)
    """What may have happened, each cause once."""
    planned_memory: int | None = None
    """Memory in bytes that the levels run so far were expected to take."""

    @property
    def ok(self) -> bool:
        """Whether every level that was asked for ran and passed, and nothing differed."""
        ran = [self.levels[name].ok for name in self.asked if name in self.levels]
        return not self.differences and all(ran) and len(ran) == len(self.asked)

    @property
    def first_difference(self) -> Difference | None:
        """First difference, if there is any."""
        return self.differences[0] if self.differences else None

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON object."""
        first = self.first_difference
        return {
            "levels": {name: {"ok": r.ok, **r.figures} for name, r in self.levels.items()},
            "first_difference": asdict(first) if first else None,
            "diagnosis": self.diagnosis,
            "tolerance": self.tolerance,
            "planned_rss_bytes": self.planned_memory,
        }

    def note(self, *differences: Difference) -> None:
        """Add differences, with their diagnosis."""
        self.differences += differences
        for d in differences:
            text = d.diagnosis and f"{d.file}: {d.diagnosis}" if d.file else d.diagnosis
            if text and text not in self.diagnosis:
                self.diagnosis.append(text)

    def plan_memory(self, size: int) -> None:
        """Record the planned memory of a level in bytes; levels run one after the other, so the
        largest counts."""
        self.planned_memory = max(self.planned_memory or 0, size)


def names(tensor: Tensor) -> dict[str, str]:
    """Return the names of a tensor: {hf, tf, cs}."""
    return {"hf": tensor.hf, "tf": tensor.tf, "cs": tensor.cs[0]}
