"""The parameters that a run continues with in another format, beside its optimizer state."""

from __future__ import annotations

from typing import Any

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.optimizer.state import AdamSettings, OptimizerState
from gptj_convert.optimizer.target import Continuation
from gptj_convert.settings.params_yaml import complete_for_reference, params_beside, read_yaml
from gptj_convert.settings.pretraining import continued_pretraining
from gptj_model.errors import ConfigError
from gptj_model.optimizer_names import ADAMS, Grouping
from gptj_model.tensors import Scheme
from runner.config.params_file import load_params, validate
from runner.training.update.schedules import learning_rate


def continuation(checkpoint: Checkpoint, state: OptimizerState, grouping: Grouping) -> Continuation:
    """Return state and parameters: for a TensorFlow run those of its params.yaml, else what the
    state says about its optimizer, with the rest of continued pre-training.

    Raises:
        ConfigError: the params.yaml cannot be read, or has another optimizer.
    """
    values = _params(checkpoint, state)
    optimizer = validate(dict(values), {}, where=f"parameters of {checkpoint.path}").optimizer
    if optimizer.optimizer_type not in ADAMS:
        raise ConfigError(
            f"{checkpoint.path}: its params.yaml names optimizer {optimizer.optimizer_type!r}, "
            f"its checkpoint has the slots of {' or '.join(ADAMS)}"
        )
    rate = learning_rate(optimizer.learning_rate, reset=not optimizer.disable_lr_steps_reset)
    is_adam = optimizer.optimizer_type == "adam"
    settings = AdamSettings(
        learning_rate=rate(state.step),
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        weight_decay_rate=0.0 if is_adam else optimizer.weight_decay_rate,
        exclude_from_weight_decay=tuple(optimizer.exclude_from_weight_decay),
        use_bias_correction=bool(state.powers),
    )
    return Continuation(state=state, settings=settings, params=values, grouping=grouping)


def _params(checkpoint: Checkpoint, state: OptimizerState) -> dict[str, Any]:
    if checkpoint.scheme is Scheme.TF and (path := params_beside(checkpoint.files[0])):
        load_params(path)  # for its errors, which name lines
        return complete_for_reference(read_yaml(path))
    values = continued_pretraining(checkpoint.config)
    values["optimizer"] |= {"use_bias_correction": bool(state.powers)}
    if own := state.settings:
        values["optimizer"] |= {
            "learning_rate": own.learning_rate,
            "beta1": own.beta1,
            "beta2": own.beta2,
            "epsilon": own.epsilon,
            "weight_decay_rate": own.weight_decay_rate,
            "exclude_from_weight_decay": list(own.exclude_from_weight_decay),
        }
    values["runconfig"]["max_steps"] += state.step
    return values
