"""What a conversion will do, decided from headers alone: a plan, or every problem at once."""

from __future__ import annotations

from dataclasses import dataclass

from gptj_convert.checkpoint import Checkpoint
from gptj_convert.options import DEFAULT_DTYPE, KEEP
from gptj_convert.survey import hint, settle_tied_head, survey
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import FLOATS
from gptj_model.errors import TensorFault, UsageError
from gptj_model.source import TensorInfo
from gptj_model.tensors import GLOBAL_STEP, Op, Scheme, Tensor


@dataclass(frozen=True, slots=True)
class Move:
    """One tensor's way from a source to a target."""

    tensor: Tensor
    source_name: str
    source: TensorInfo
    target_name: str
    target: TensorInfo
    op: Op


@dataclass(frozen=True, slots=True)
class Plan:
    """Every move of a conversion, in the order of the table."""

    config: GPTJConfig
    scheme: Scheme
    """Of the target."""
    moves: tuple[Move, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return sum(m.source.nbytes for m in self.moves)

    @property
    def target_bytes(self) -> int:
        """Bytes to write."""
        return sum(m.target.nbytes for m in self.moves)

    @property
    def dtype(self) -> str:
        """The target's dtype, or the widest of them."""
        widths = {m.target.dtype: FLOATS[m.target.dtype].itemsize for m in self.moves}
        return max(widths, key=lambda name: widths[name])


def match(checkpoint: Checkpoint) -> list[tuple[Tensor, str, TensorInfo]]:
    """Every row of the table with the name and header of the checkpoint's tensor for it.

    Raises:
        TensorFault: a tensor is missing, unknown, or of another shape or kind than the config
            calls for; all such tensors are named.
    """
    source, scheme, config = checkpoint.source, checkpoint.scheme, checkpoint.config
    findings = settle_tied_head(survey(source.tensors, scheme, config), source)
    problems = [f.problem for f in findings if f.problem]
    if problems:
        raise TensorFault(str(checkpoint.path), problems, hint=hint(findings, scheme, config))
    return [(f.tensor, f.name, f.info) for f in findings if f.tensor and f.info]


def make_plan(checkpoint: Checkpoint, target: Scheme, dtype: str) -> Plan:
    """Plan the conversion of an open checkpoint.

    Args:
        checkpoint: the source.
        target: `Scheme.TF` or `Scheme.HF`.
        dtype: one of `options.DTYPES`, or `options.KEEP`.

    Raises:
        TensorFault: see `match`.
        UsageError: the target would be a copy of the source.
    """
    if target is checkpoint.scheme:
        others = " or ".join(name for name in DEFAULT_DTYPE if name != target.value)
        raise UsageError(
            f"{checkpoint.path}: is in the {target.value} format already",
            hint=f"choose --to {others}",
        )
    moves = []
    for tensor, name, info in match(checkpoint):
        stored = info.dtype if dtype == KEEP else dtype
        (target_name,) = tensor.names(target)
        moves.append(
            Move(
                tensor=tensor,
                source_name=name,
                source=info,
                target_name=target_name,
                target=TensorInfo(stored, tensor.shape_in(target)),
                op=tensor.op(checkpoint.scheme, target),
            )
        )
    return Plan(checkpoint.config, target, tuple(moves))


def target_tensors(plan: Plan) -> dict[str, TensorInfo]:
    """What the target holds: the moved tensors and, in TF, the step counter."""
    tensors = {m.target_name: m.target for m in plan.moves}
    if plan.scheme is Scheme.TF:
        tensors[GLOBAL_STEP] = TensorInfo("int64", ())
    return tensors
