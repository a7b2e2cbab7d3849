"""What flash attention needs of parameters and GPU."""

from __future__ import annotations

from collections.abc import Iterator

from gptj_model.errors import ConfigError
from runner.config.execution import Backend
from runner.config.params import Params

#: Without it attention is computed by the plain product.
OFF = "--set model.flash_attention=false"


def check_flash_attention(params: Params) -> None:
    """Check that parameters which ask for flash attention fit it, as far as they alone tell.

    Raises:
        ConfigError: names everything that does not fit.
    """
    if params.model.flash_attention and (problems := list(_problems(params))):
        raise ConfigError(
            f"model.flash_attention is true, and {'; '.join(problems)}",
            hint=f"change that, or compute attention by the plain product: {OFF}",
        )


def _problems(params: Params) -> Iterator[str]:
    model, backend = params.model, params.runconfig.backend
    if backend != Backend.JAX:
        yield f"runconfig.backend is {backend}, expected {Backend.JAX}"
    if not model.mixed_precision:
        yield "model.mixed_precision is false, expected true: the kernel multiplies 16 bits"
    if rate := model.attention_dropout_rate:
        yield f"model.attention_dropout_rate is {rate}, expected 0"
    features = params.config.head_dim
    if features > 256 or features % 8:
        yield f"a head has {features} features, expected a multiple of 8 up to 256"


def has_kernel(capability: tuple[int, int], features: int) -> bool:
    """Return whether cuDNN has the kernel and its backward pass (its support matrix, 2026-11).

    Args:
        capability: compute capability of the GPU.
        features: features of a head, at most 256.
    """
    if features <= 128:
        return capability >= (8, 0)
    major, _ = capability
    return major == 9 or (major == 10 and features == 256)  # Hopper; data-center Blackwell
