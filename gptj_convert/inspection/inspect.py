"""Contents of a checkpoint: every tensor with its names and role, and statistics of its values.

Tensors that are missing, unknown or of another shape are listed, not refused.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptj_convert.checkpoint.match import Finding, Role, survey
from gptj_convert.checkpoint.open import locate, open_named, read_config
from gptj_convert.checkpoint.source_names import RenamedSource
from gptj_convert.checkpoint.tensor_problems import hint, whole_problem
from gptj_convert.streams.progress import Progress, Work
from gptj_convert.streams.strips import Panels
from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from gptj_model.op import Op
from gptj_model.source import TensorSource
from gptj_model.tensors import Scheme

#: Number of values processed at once: in float64 they stay in the CPU cache, and are too few for
#: BLAS to start threads, which takes four times as long.
_CHUNK = 2**13


@dataclass(frozen=True, slots=True)
class Inspection:
    """An open checkpoint and what its headers say. Use it as a context manager."""

    path: Path
    """Path that was asked for."""
    scheme: Scheme
    source: TensorSource
    files: tuple[Path, ...]
    """Files that hold its tensors."""
    config: GPTJConfig | None
    config_fault: ConfigError | None
    """Why there is no config, and so nothing to match names with."""
    findings: tuple[Finding, ...]

    def __enter__(self) -> Inspection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.source.close()

    @property
    def problems(self) -> list[str]:
        """How the tensors differ from those that the config calls for, one line each."""
        if whole := whole_problem(self.source.tensors):
            return [whole[0]]
        unmatched = [f"names cannot be matched: {e.message}"] if (e := self.config_fault) else []
        return unmatched + [f.problem for f in self.findings if f.problem]

    @property
    def hint(self) -> str | None:
        """What to do about the problems, where that is known."""
        if whole := whole_problem(self.source.tensors):
            return whole[1]
        if self.config is None:
            return "name the model's configuration with `--config FILE`"
        return hint(self.findings, self.scheme, self.config) if self.problems else None

    def name_in_file(self, finding: Finding) -> str:
        """Return the name of a tensor in the file; for a missing one, the table's name."""
        renamed = self.source.in_file if isinstance(self.source, RenamedSource) else {}
        return renamed.get(finding.name, finding.name)

    def totals(self) -> dict[str, Any]:
        """Return the numbers of tensors, of parameters (values of weights) and of bytes, also by
        dtype."""
        present = [(f, f.info) for f in self.findings if f.info]
        tensors, bytes_ = Counter[str](), Counter[str]()
        for _, info in present:
            tensors[info.dtype] += 1
            bytes_[info.dtype] += info.nbytes
        weights = (i for f, i in present if f.role in (Role.WEIGHT, Role.UNMATCHED))
        return {
            "tensors": len(present),
            "parameters": sum(math.prod(info.shape) for info in weights),
            "bytes": sum(bytes_.values()),
            "dtypes": {d: {"tensors": n, "bytes": bytes_[d]} for d, n in tensors.items()},
        }

    def to_json(self, statistics: dict[str, Statistics] | None = None) -> dict[str, Any]:
        """Return the fields of the JSON object.

        Args:
            statistics: statistics by name in the source, for the field `stats`.
        """
        return {
            "path": str(self.path),
            "format": self.scheme.value,
            "files": [str(f) for f in self.files],
            "config": self.config.own_fields() if self.config else None,
            "tensors": [
                _tensor_json(f, self.name_in_file(f), statistics or {}) for f in self.findings
            ],
            "totals": self.totals(),
            "problems": self.problems,
            "hint": self.hint,
        }


def inspect(path: Path, *, config_file: Path | None = None) -> Inspection:
    """Open the checkpoint that `path` is or holds, and read its headers.

    Args:
        path: folder, weight file, or prefix of a bundle.
        config_file: file that states the config, instead of the one beside the weights.

    Raises:
        ConfigError: `config_file` describes no GPT-J.
        FileFault: there is no checkpoint, or it is corrupt.
    """
    location = locate(path)
    config = fault = None
    try:
        config = read_config(location, config_file)
    except ConfigError as e:
        if config_file:
            raise
        fault = e
    source, files = open_named(location)
    findings = survey(source.tensors, location.scheme, config)
    return Inspection(path, location.scheme, source, files, config, fault, tuple(findings))


class Statistics:
    """Statistics of values that are added piece by piece, in float64.

    `minimum`, `maximum`, `mean` and `std` cover the finite values. They are None without any, and
    where float64 cannot hold them.

    Attributes:
        nan: number of values that are NaN.
        infinite: number of infinities of either sign.
        zero: number of zeros of either sign.
    """

    def __init__(self) -> None:
        self.nan = self.infinite = self.zero = 0
        self._finite = 0
        self._minimum, self._maximum = math.inf, -math.inf
        self._mean = self._squares = 0.0

    @property
    def minimum(self) -> float | None:
        """Smallest finite value."""
        return self._minimum if self._finite else None

    @property
    def maximum(self) -> float | None:
        """Largest finite value."""
        return self._maximum if self._finite else None

    @property
    def mean(self) -> float | None:
        """Mean of the finite values."""
        return self._mean if self._finite and math.isfinite(self._mean) else None

    @property
    def std(self) -> float | None:
        """Standard deviation of the finite values, as of a whole population."""
        std = math.sqrt(self._squares / self._finite) if self._finite else math.nan
        return std if math.isfinite(std) else None

    def add(self, values: np.ndarray) -> None:
        """Add values."""
        flat = values.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, flat.size, _CHUNK):
                self._add(flat[start : start + _CHUNK].astype(np.float64))

    def _add(self, values: np.ndarray) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            nan = int(np.count_nonzero(np.isnan(values)))
            values = values[finite]
            self.nan += nan
            self.infinite += finite.size - values.size - nan
        if not values.size:
            return
        self.zero += values.size - int(np.count_nonzero(values))
        self._minimum = min(self._minimum, float(values.min()))
        self._maximum = max(self._maximum, float(values.max()))
        # Means and squared deviations of two parts are joined (Chan, Golub and LeVeque), which is
        # exact where a sum of squares would cancel.
        mean = float(values.mean())
        values -= mean
        before, delta = self._finite, mean - self._mean
        self._finite += values.size
        share = values.size / self._finite
        self._mean += delta * share
        self._squares += float(values @ values) + delta * delta * before * share

    def to_json(self) -> dict[str, Any]:
        """Return the fields of a JSON object; no number in it is NaN or infinite."""
        return {
            "min": self.minimum,
            "max": self.maximum,
            "mean": self.mean,
            "std": self.std,
            "nan": self.nan,
            "infinite": self.infinite,
            "zero": self.zero,
        }


def gather_statistics(inspection: Inspection) -> Work[dict[str, Statistics]]:
    """Return the statistics of every tensor, by its name in the file; progress is in bytes.

    Raises:
        FileFault: the file is cut short, or a device fails.
    """
    statistics: dict[str, Statistics] = {}
    total, done = inspection.totals()["bytes"], 0
    for name in inspection.source.tensors:
        figures = statistics[name] = Statistics()
        for values in Panels(inspection.source, name, Op.COPY):
            figures.add(values)
            yield Progress(done := done + values.nbytes, total, name)
    return statistics


def _tensor_json(finding: Finding, name: str, statistics: dict[str, Statistics]) -> dict[str, Any]:
    tensor, info = finding.tensor, finding.info
    shown: dict[str, Any] = {
        "name": name,
        "hf": tensor.hf if tensor else None,
        "tf": tensor.tf if tensor else None,
        "cs": list(tensor.cs) if tensor else None,
        "shape": list(info.shape) if info else None,
        "dtype": info.dtype if info else None,
        "bytes": info.nbytes if info else None,
        "block": tensor.block if tensor else None,
        "role": finding.role.value,
        "problem": finding.problem,
    }
    if figures := statistics.get(finding.name):
        shown["stats"] = figures.to_json() if info else None
    return shown
