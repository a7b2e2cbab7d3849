"""Load a model from a checkpoint of any format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gptj_convert.checkpoint.open import Checkpoint, open_checkpoint
from gptj_convert.conversion.plan import match
from gptj_model.config import GPTJConfig
from gptj_model.network.model import GPTJ
from gptj_model.network.weights import load_weights
from gptj_model.streaming.forward import StreamedModel
from gptj_model.streaming.residency import Residency


def load_model(
    path: Path,
    *,
    adapt: Callable[[GPTJConfig], GPTJConfig] = lambda config: config,
    seed: int = 0,
    config_file: Path | None = None,
) -> GPTJ:
    """Open, check and load a checkpoint.

    Args:
        path: Hugging Face folder or file, converted folder, folder of a run, or prefix of a bundle.
        adapt: function that returns the configuration to use, such as one with other dropout
            rates, or raises.
        seed: seed of the dropout masks.
        config_file: configuration of a bundle that has none beside it.

    Raises:
        GptjError: see `open_checkpoint` and `match`.
    """
    with open_checkpoint(path, config_file=config_file) as checkpoint:
        return loaded(checkpoint, adapt(checkpoint.config), seed=seed)


def model_of(
    checkpoint: Checkpoint,
    *,
    keep: Callable[[Checkpoint], Residency] | None,
    dtype: str = "float32",
) -> GPTJ | StreamedModel:
    """Return the model of an open checkpoint, loaded, or read block by block while it is open.

    Args:
        checkpoint: the checkpoint.
        keep: function that chooses which blocks of a streamed model stay in memory; None loads
            the whole model.
        dtype: dtype of the weights of a loaded model; a streamed one computes in float32.

    Raises:
        GptjError: see `match`.
    """
    if keep is None:
        return loaded(checkpoint, checkpoint.config, dtype=dtype)
    match(checkpoint)
    return StreamedModel(
        checkpoint.config, checkpoint.source, checkpoint.scheme, kept=keep(checkpoint)
    )


def loaded(
    checkpoint: Checkpoint, config: GPTJConfig, *, seed: int = 0, dtype: str = "float32"
) -> GPTJ:
    """Check and load an open checkpoint.

    Args:
        checkpoint: the checkpoint.
        config: its configuration, maybe with other dropout rates.
        seed: seed of the dropout masks.
        dtype: dtype of weights and products: float32, bfloat16 or float16. Softmax, norms and
            rotary angles are float32 whatever it is.

    Raises:
        GptjError: see `match`.
    """
    match(checkpoint)
    model = GPTJ(config, seed=seed, dtype=dtype)
    load_weights(model, checkpoint.source, checkpoint.scheme)
    return model
