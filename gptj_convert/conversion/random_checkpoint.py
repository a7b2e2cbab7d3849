"""A random GPT-J in the Hugging Face layout, with the true structure and size, for trials."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptj_convert.conversion.execute import check_space
from gptj_convert.files.output_folder import output_folder
from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from gptj_convert.formats.layouts.hf import GENERATION_FILE, hf_layout
from gptj_convert.options import FILE_FORMATS
from gptj_convert.settings.generation_settings import generation_text
from gptj_convert.streams.pipeline import Pipeline
from gptj_convert.streams.progress import Progress, Work
from gptj_convert.streams.strips import PANEL_BYTES, Strip
from gptj_convert.streams.writer import ResumePoint, reserve, write_files
from gptj_model.config import CONFIG_FILE, VOCAB_SIZE, GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.op import Op
from gptj_model.source import TensorInfo
from gptj_model.tensors import Role, Tensor, table


def write_random_checkpoint(
    config: GPTJConfig,
    out: Path,
    *,
    seed: int,
    dtype: str,
    file_format: str = "safetensors",
    transposed: bool = False,
    max_shard_bytes: int | None = None,
    force: bool = False,
) -> Work[None]:
    """Write weights, config.json and, if the vocabulary is GPT-J's, the tokenizer.

    The values depend neither on the dtype (except for rounding), nor on how they are stored, nor on
    numpy's number of threads.

    Args:
        config: configuration of the model.
        out: folder to write.
        seed: seed of the values.
        dtype: dtype of the weights.
        file_format: key of `options.FILE_FORMATS`.
        transposed: whether to store the weights of linear layers as transposed views, as the public
            GPT-J-6B does; one such matrix at a time is held in memory. Needs `bin`.
        max_shard_bytes: largest size of one weight file; see `hf_layout`.
        force: whether to overwrite an existing folder.

    Raises:
        UsageError: `out` exists and `force` is off; see also `hf_layout`.
        OSError: the disk is full or not writable.
    """
    tensors = {t.hf: (n, t) for n, t in enumerate(table(config))}
    infos = {
        name: TensorInfo(dtype, t.shape, t.tf_op if transposed else Op.COPY)
        for name, (_, t) in tensors.items()
    }
    layout = hf_layout(infos, max_shard_bytes, file=FILE_FORMATS[file_format])

    def strips(name: str) -> Iterator[Strip]:
        n, tensor = tensors[name]
        generator = np.random.Generator(np.random.SFC64([seed, n]))
        pieces = _values(tensor, config, generator)
        if infos[name].storage_op is Op.TRANSPOSE:
            yield Strip(_whole(pieces, infos[name]), Op.TRANSPOSE)
            return
        for values in pieces:
            yield Strip(values, Op.COPY)

    done = 0
    with output_folder(out, force=force) as staging:
        check_space(layout.total, out)
        reserve(layout, staging.content)
        with Pipeline() as pipeline:
            for event in write_files(layout, staging.content, strips, pipeline, ResumePoint()):
                done += event.nbytes
                yield Progress(done, layout.total, event.file)
        folder = staging.content
        hf_config = json.dumps(config.to_hf(dtype=dtype), indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(hf_config, encoding="utf-8")
        (folder / GENERATION_FILE).write_text(generation_text(config), encoding="utf-8")
        if config.vocab_size == VOCAB_SIZE:
            write_tokenizer(folder)


def _whole(pieces: Iterator[np.ndarray], info: TensorInfo) -> np.ndarray:
    """Return a matrix made of its pieces, rounded to its dtype."""
    matrix = np.empty(info.shape, NUMPY[info.dtype])
    flat, at = matrix.reshape(-1), 0
    for piece in pieces:
        flat[at : at + piece.size] = piece
        at += piece.size
    return matrix


def _values(
    tensor: Tensor, config: GPTJConfig, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield float32 pieces of a tensor, of a scale at which every part of the model matters.

    Matrices preserve the scale of their input, those that add to the residual stream are smaller by
    the number of additions, gains lie around 1, and no bias is 0: so an exchanged, transposed or
    dropped tensor changes the logits.
    """
    scale, mean = 0.02, 0.0
    if len(tensor.shape) == 2:
        scale = tensor.shape[1] ** -0.5
        if tensor.role is Role.RESIDUAL:
            scale *= (2 * config.n_layer) ** -0.5
    elif tensor.role is Role.GAIN:
        scale, mean = 0.1, 1.0
    left = tensor.size
    while left:
        count = min(left, PANEL_BYTES // 4)
        yield generator.standard_normal(count, dtype=np.float32) * np.float32(scale) + np.float32(
            mean
        )
        left -= count
