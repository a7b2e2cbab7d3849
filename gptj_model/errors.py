"""Faults that a user can act on. They carry data; the text around them is made at the edge."""

from __future__ import annotations

from collections.abc import Sequence


class GptjError(Exception):
    """Base of every fault that is reported without a traceback.

    Attributes:
        message: what was found, where, and what was expected.
        hint: the next step, or None.
        kind: a stable word for programs, one per class.
    """

    kind = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(GptjError):
    """A command line that asks for something impossible."""

    kind = "usage"


class ConfigError(GptjError):
    """A model or training configuration that is unreadable or asks for what is not implemented."""

    kind = "config"


class FileFault(GptjError):
    """A file that is missing, cut short, corrupt, or cannot be read or written."""

    kind = "file"


class HubFault(GptjError):
    """A download that failed: network, access, or no such repository."""

    kind = "hub"


class DataFault(GptjError):
    """Training records or raw text that are not what they must be."""

    kind = "data"


class TensorFault(GptjError):
    """Tensors of a checkpoint that are not those its configuration calls for.

    Attributes:
        problems: every problem found, one line each.
    """

    kind = "tensors"

    def __init__(self, where: str, problems: Sequence[str], *, hint: str | None = None) -> None:
        self.problems = tuple(problems)
        shown = self.problems if len(self.problems) <= 12 else self.problems[:10]
        lines = [f"{where}: {len(self.problems)} problem(s) with its tensors"]
        lines += [f"  {p}" for p in shown]
        if len(shown) < len(self.problems):
            lines.append(f"  … and {len(self.problems) - len(shown)} more")
        super().__init__("\n".join(lines), hint=hint)


class MemoryFault(GptjError):
    """Less memory from the system than the work needs."""

    kind = "memory"


class TrainingFault(GptjError):
    """A run that cannot start or resume: another run's folder, a damaged checkpoint, a diverged
    loss."""

    kind = "training"
