"""Recordings of the original's outputs, for `verify` on a machine without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from crc32c import crc32c

from golden.prompts import SHORT, Prompt, battery
from golden.recording import RecordedPrompt, Recording, kept_tokens, write_recording
from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.plan import match
from gptj_convert.files.output_folder import output_folder
from gptj_convert.options import DTYPES
from gptj_convert.resources.environment import library_versions
from gptj_convert.streams.progress import Progress, Work
from gptj_convert.streams.strips import Strips, in_panels
from gptj_model.dtypes import NUMPY
from gptj_model.errors import GptjError
from gptj_model.op import Op
from gptj_model.source import TensorSource, raw_bytes
from gptj_model.tensors import Scheme, Tensor


def record(
    checkpoint: Checkpoint, out: Path, *, dtype: str | None, made_by: str, force: bool
) -> Work[None]:
    """Run the original on the prompts and write a recording.

    Args:
        checkpoint: the original, in any format.
        out: folder to write, which appears when it is complete.
        dtype: dtype that the weights are rounded to first; None leaves them as they are.
        made_by: description of the model.
        force: whether to overwrite an existing `out`.

    Raises:
        UsageError: `out` exists, and `force` is off.
        GptjError: the logits are NaN or infinite.
    """
    from golden.reference import StreamedReference

    config = checkpoint.config
    matched = match(checkpoint)
    stored = [info.dtype for _, _, info in matched]
    widest = next(name for name in ("float64", *DTYPES) if name in stored)
    with output_folder(out, force=force) as staging:
        stages = len(matched) + config.n_layer + 1
        weights = {}
        for n, (tensor, name, _) in enumerate(matched, start=1):
            weights[tensor.hf] = {
                to: checksum(tensor, checkpoint.source, name, checkpoint.scheme, to)
                for to in DTYPES
            }
            yield Progress(n, stages, tensor.hf)
        reference = StreamedReference(config, checkpoint.source, checkpoint.scheme, round_to=dtype)
        prompts = [p for p in battery(config) if not p.padded and not p.pieces]
        run = _Run(prompts, [reference.embed(p.ids) for p in prompts])
        for i in range(config.n_layer):
            block = reference.load_block(i)
            run.states = [
                block.run(x, p.positions) for x, p in zip(run.states, prompts, strict=True)
            ]
            run.keep()
            yield Progress(len(matched) + i + 1, stages, f"block {i}")
        head = reference.head(last=True)
        logits = head.logits(head.normed(run.of_kept_tokens))
        if not all(np.isfinite(x).all() for x in logits):
            raise GptjError(f"{checkpoint.path}: its logits are NaN or infinite")
        recording = Recording(
            config=config,
            dtype=dtype or widest,
            made_by=made_by,
            versions=library_versions(),
            weights=weights,
            prompts=tuple(
                RecordedPrompt(
                    prompt=p, kept=kept_tokens(p), logits=x[0], hidden=run.hidden.get(p.name)
                )
                for p, x in zip(prompts, logits, strict=True)
            ),
        )
        write_recording(recording, staging.content)
        yield Progress(stages, stages, "logits")


@dataclass(slots=True)
class _Run:
    prompts: list[Prompt]
    states: list[np.ndarray]
    hidden: dict[str, np.ndarray] = field(default_factory=dict)
    """Hidden states after each block so far, by name of a short prompt: (L, T, D)."""

    def keep(self) -> None:
        """Record the hidden states of short prompts after a block."""
        for p, x_BTD in zip(self.prompts, self.states, strict=True):
            if p.name in SHORT:
                before = self.hidden.get(p.name, np.empty((0, *x_BTD.shape[1:]), np.float32))
                self.hidden[p.name] = np.concatenate([before, x_BTD])

    @property
    def of_kept_tokens(self) -> list[np.ndarray]:
        """Current states of the tokens whose logits are recorded: (1, N, D) each."""
        pairs = zip(self.prompts, self.states, strict=True)
        return [np.ascontiguousarray(x_BTD[:, kept_tokens(p)]) for p, x_BTD in pairs]


def checksum(tensor: Tensor, source: TensorSource, name: str, scheme: Scheme, dtype: str) -> str:
    """Return the crc32c in hex of a tensor's values in HF's layout, rounded to a dtype."""
    op: Op = tensor.op(scheme, Scheme.HF)
    crc = 0
    for panel in in_panels(Strips(source, name, op), NUMPY[dtype]):
        crc = crc32c(raw_bytes(np.ascontiguousarray(panel)), crc)
    return f"{crc:08x}"
