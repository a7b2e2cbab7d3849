"""The params.yaml of a converted model: continued pre-training, sized to this machine."""

from __future__ import annotations

from typing import Any

from gptj_convert.resources import footprint, machine
from gptj_convert.settings.params_yaml import READ_WITHOUT_DEFAULT, model_section
from gptj_model.config import GPTJConfig


def continued_pretraining(config: GPTJConfig) -> dict[str, Any]:
    """Return parameters for continued pre-training: the reference's 6B values, sized to this
    machine.

    The learning rate starts, after a short warm-up, where the published run ended its decay.
    """
    batch = fitting_batch_size(config)
    inputs: dict[str, Any] = {
        "data_processor": "GptTfRecordsProcessor",
        "data_dir": "data",
        "vocab_size": config.vocab_size,
        "max_sequence_length": config.n_positions,
        "batch_size": batch,
    }
    return {
        "train_input": inputs | {"shuffle": True, "shuffle_seed": 1, "repeat": True},
        "eval_input": inputs | {"shuffle": False, "repeat": False},
        "model": model_section(config) | READ_WITHOUT_DEFAULT,
        "optimizer": {
            "optimizer_type": "adamw",
            "epsilon": 1e-6,
            "weight_decay_rate": 0.1,
            "max_gradient_norm": 1.0,
            "use_bias_correction": True,
            "learning_rate": [
                {
                    "scheduler": "Linear",
                    "initial_learning_rate": 0.0,
                    "end_learning_rate": 4.3e-5,
                    "steps": 100,
                },
                {
                    "scheduler": "Cosine",
                    "initial_learning_rate": 4.3e-5,
                    "decay_steps": 9900,
                    "alpha": 0.1,
                },
                {"scheduler": "Constant", "learning_rate": 4.3e-6},
            ],
        },
        "runconfig": {
            "max_steps": 10000,
            "save_checkpoints_steps": 500,
            "keep_checkpoint_max": footprint.KEPT_CHECKPOINTS,
            "log_step_count_steps": 10,
        },
    }


def fitting_batch_size(config: GPTJConfig) -> int:
    """Return the number of sequences per step, from 1 to 8, that fit in half of the memory beside
    weights and optimizer slots."""
    free = machine.memory_total() // 2 - footprint.training_state(config)
    return max(1, min(8, free // footprint.sequence_activations(config)))
