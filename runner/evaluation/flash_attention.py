"""Flash attention for a run, proven against the plain product before it is used."""

from __future__ import annotations

from typing import Any

import jax

from golden.tolerances import FLASH_ATTENTION
from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError, TrainingFault
from gptj_model.network.flash_attention import differences, flash_attention
from gptj_model.network.layers import Attend
from runner.config.flash_attention import OFF, check_flash_attention, has_kernel
from runner.config.params import Params

#: Largest number of tokens of the sequence that both ways are compared on.
_TOKENS = 512


def chosen_attention(config: GPTJConfig, params: Params) -> Attend | None:
    """Return the attention that the parameters ask for; None is the plain product.

    Args:
        config: configuration of the model.
        params: parameters of the run.

    Raises:
        ConfigError: parameters or GPU do not fit the kernel, or cuDNN refuses it.
        TrainingFault: its results are not those of the plain product.
    """
    if not params.model.flash_attention:
        return None
    check_flash_attention(params)
    check_device(jax.local_devices()[0], config.head_dim)
    attend = flash_attention(config)
    try:
        prove(config, params, attend)
    except (NotImplementedError, ValueError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ConfigError(
            f"model.flash_attention is true, and cuDNN refuses its kernel: {reason}",
            hint=f"compute attention by the plain product: {OFF}",
        ) from None
    return attend


def check_device(device: Any, features: int) -> None:
    """Check that a device of JAX has the kernel for heads with this number of features.

    Raises:
        ConfigError: it has none.
    """
    found = f"{device.device_kind} ({device.platform})"
    if "cuda" in device.client.platform_version:
        major, minor = map(int, device.compute_capability.split("."))
        if has_kernel((major, minor), features):
            return
        found = f"{device.device_kind}, compute capability {major}.{minor}"
    wanted = "9.0, as of H100 and H200" if features > 128 else "8.0 or more"
    raise ConfigError(
        f"model.flash_attention is true, and JAX computes with {found}, expected an NVIDIA GPU of "
        f"compute capability {wanted}: heads have {features} features",
        hint=f"compute attention by the plain product: {OFF}",
    )


def prove(config: GPTJConfig, params: Params, attend: Attend) -> dict[str, float]:
    """Compare attention with the plain product, on one block with random weights and one sequence.

    Returns:
        The figures of `differences`.

    Raises:
        TrainingFault: a figure exceeds its tolerance.
    """
    tolerance = FLASH_ATTENTION[params.model.mixed_precision_dtype]
    length = min(params.train_input.max_sequence_length, _TOKENS)
    found = differences(config, attend, dtype=params.dtype_policy, batch=1, length=length)
    worst = max(found, key=lambda name: found[name])
    if not found[worst] <= tolerance:  # NaN too
        raise TrainingFault(
            f"flash attention differs from the plain product by {found[worst]:.1e} ({worst}), "
            f"expected at most {tolerance:.0e}",
            hint=f"compute attention by the plain product: {OFF}",
        )
    return found
