"""Load a model from a checkpoint of any format."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from gptj_convert.checkpoint.open import Checkpoint, open_checkpoint
from gptj_convert.conversion.plan import match
from gptj_model.config import GPTJConfig
from gptj_model.network.model import GPTJ
from gptj_model.network.weights import forget, load_weights, variables
from gptj_model.streaming.forward import StreamedModel
from gptj_model.streaming.residency import Residency
from runner.evaluation.reuse import borrow


def load_model(path: Path, *, lent: ExitStack | None = None) -> GPTJ:
    """Open, check and load a checkpoint.

    Args:
        path: Hugging Face folder or file, converted folder, folder of a run, or prefix of a bundle.
        lent: see `loaded`.

    Raises:
        GptjError: see `open_checkpoint` and `match`.
    """
    with open_checkpoint(path) as checkpoint:
        return loaded(checkpoint, checkpoint.config, lent=lent)


def model_of(
    checkpoint: Checkpoint,
    *,
    keep: Callable[[Checkpoint], Residency] | None,
    dtype: str = "float32",
    lent: ExitStack | None = None,
) -> GPTJ | StreamedModel:
    """Return the model of an open checkpoint, loaded, or read block by block while it is open.

    Args:
        checkpoint: the checkpoint.
        keep: function that chooses which blocks of a streamed model stay in memory; None loads
            the whole model.
        dtype: dtype of the weights of a loaded model; a streamed one computes in float32.
        lent: see `loaded`.

    Raises:
        GptjError: see `match`.
    """
    if keep is None:
        return loaded(checkpoint, checkpoint.config, dtype=dtype, lent=lent)
    match(checkpoint)
    return StreamedModel(
        checkpoint.config, checkpoint.source, checkpoint.scheme, kept=keep(checkpoint)
    )


def loaded(
    checkpoint: Checkpoint,
    config: GPTJConfig,
    *,
    dtype: str = "float32",
    lent: ExitStack | None = None,
) -> GPTJ:
    """Check and load an open checkpoint.

    Args:
        checkpoint: the checkpoint.
        config: its configuration, maybe with other dropout rates.
        dtype: dtype of weights and products: float32, bfloat16 or float16. Softmax, norms and
            rotary angles are float32 whatever it is.
        lent: takes the model back when it ends, for the next user of its shape (`borrow`); None
            leaves it to the caller.

    Raises:
        GptjError: see `match`.
    """
    match(checkpoint)
    if lent:
        borrowed = borrow(
            (GPTJ, config, dtype),
            lambda: GPTJ(config, dtype=dtype),
            lambda left: forget(variables(left).values()),
        )
        lent.callback(borrowed.give_back)
        model = borrowed.model
    else:
        model = GPTJ(config, dtype=dtype)
    load_weights(model, checkpoint.source, checkpoint.scheme)
    return model
