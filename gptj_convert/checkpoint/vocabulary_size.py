"""The vocabulary size of a model: by its config, and by the rows of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gptj_convert.options import FROM_CONFIG, FROM_TENSORS
from gptj_model.config import GPTJConfig
from gptj_model.source import TensorInfo
from gptj_model.tensors import Scheme, vocabulary

NEVER = "rows are never invented or dropped"


def rows(config: GPTJConfig, scheme: Scheme, tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Return the number of rows of each tensor that has one row per token, by its name in the
    scheme.

    Tensors that differ from the config in more than their rows are left out.
    """
    found = {}
    for tensor in vocabulary(config):
        name = tensor.name(scheme)
        if name in tensors:
            shape = tensor.op(scheme, Scheme.HF).shape(tensors[name].shape)
            if shape and shape[1:] == tensor.shape[1:]:
                found[name] = shape[0]
    return found


def settle(
    config: GPTJConfig, scheme: Scheme, tensors: Mapping[str, TensorInfo], choice: str | None
) -> GPTJConfig:
    """Return the config, with the tensors' number of rows if that is chosen and they agree on one.

    Args:
        config, scheme, tensors: configuration and tensors of a checkpoint.
        choice: one of `options.VOCAB_SIZES`; None means that both must agree.

    Raises:
        ConfigError: no model can have that vocabulary size.
    """
    counts = set(rows(config, scheme, tensors).values())
    if choice == FROM_TENSORS and len(counts) == 1:
        return replace(config, vocab_size=counts.pop())
    return config


def disagreement(config: GPTJConfig, found: Mapping[str, int]) -> str | None:
    """Return what is wrong with these `rows`, or None."""
    counts = set(found.values())
    if counts <= {config.vocab_size}:
        return None
    if len(counts) == 1:
        names = ", ".join(repr(name) for name in found)
        return f"vocab_size is {config.vocab_size}, but {counts.pop()} rows are in {names}"
    each = ", ".join(f"{count} in {name!r}" for name, count in found.items())
    return f"rows are {each}, expected the same number in each; vocab_size is {config.vocab_size}"


def hint(found: Mapping[str, int], choice: str | None) -> str:
    """Return what to do about a `disagreement`."""
    counts = set(found.values())
    if len(counts) > 1 or choice == FROM_CONFIG:
        return (
            "resize the embeddings where the model was made, with transformers' "
            f"resize_token_embeddings; {NEVER}"
        )
    return (
        f"convert with `--vocab-size {FROM_TENSORS}` if the tensors are right: it writes "
        f"{counts.pop()} into the new config.json; {NEVER}"
    )
