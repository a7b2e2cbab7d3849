"""Memory, disk and operations that running and training GPT-J take, by formula from a config.

Nothing here examines the machine: `gptj_convert.resources.machine` and
`gptj_convert.resources.rates` do. What conversions take is in `gptj_convert.conversion.cost`. All
sizes are in bytes. Constants that are called measured were measured in 2026-11 on 2-core machines
with 24 GiB. Each command prints or returns its planned memory beside its peak;
`benchmarks/memory.py`, `benchmarks/training.py` and `benchmarks/streaming.py` measure conversion,
training and streaming at the 6B's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from gptj_convert.resources.rates import Rates
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.sharding import Mesh, part_size
from gptj_model.streaming.residency import NOTHING_RESIDENT, Residency
from gptj_model.tensors import EMBEDDING, Tensor, block, table
from gptj_model.vocabulary import PART

#: The interpreter with numpy and the command line, measured.
INTERPRETER = 45_000_000
#: `gptj download` with the hub's client and one piece of 1 MiB at a time, measured.
DOWNLOAD = 200_000_000
#: TensorFlow with Keras, and both with torch and transformers, imported and warm, measured.
_TENSORFLOW = 600_000_000
_BOTH_FRAMEWORKS = 960_000_000
#: Memory that compiling a step takes and does not return, measured.
_COMPILER = 200_000_000
#: Graphs of the signatures of a SavedModel while they are traced and written: of any model, and of
#: each of its blocks, measured with 3 and 28 blocks.
_GRAPHS, _BLOCK_GRAPHS = 80_000_000, 14_000_000
#: Parsed JSON of a tokenizer with GPT-J's vocabulary size, measured.
TOKENIZER = 15_000_000

#: Number of checkpoints of a run that the params.yaml of a conversion keeps.
KEPT_CHECKPOINTS = 2


def logits_memory(config: GPTJConfig, lengths: Sequence[int]) -> int:
    """Return the peak memory of verify's level logits.

    The peak is reached while a block is loaded or while logits are compared. While a block is
    loaded, both sides hold it in float32, the reference also in float64 for the noise floor, and
    one buffer passes it on. While logits are compared, memory holds what TensorFlow has not
    returned, a part of both heads, the logits of all prompts on both sides, and float64 copies of
    the longest. The factors are measured at the 6B's width.

    Args:
        config: configuration of both sides.
        lengths: number of tokens of each prompt; the hidden states of both sides are kept.
    """
    one_block = _block_bytes(config)
    part = 4 * PART * config.n_embd
    states = 2 * 4 * sum(lengths) * config.n_embd
    logits = 8 * sum(lengths) * config.vocab_size
    loading = 5.1 * one_block
    comparing = 2 * one_block + 3 * part + logits + 8 * max(lengths) * config.vocab_size
    return round(_BOTH_FRAMEWORKS + states + max(loading, comparing))


def gradients_memory(config: GPTJConfig) -> int:
    """Return the peak memory of verify's level gradients: a block and its gradients in float32 on
    both sides, and copies of them. The factor is measured at the 6B's width."""
    return round(_BOTH_FRAMEWORKS + 10 * _block_bytes(config))


def tasks_memory(config: GPTJConfig, *, batch: int, length: int, states: int, scored: int) -> int:
    """Return the peak memory of verify's level tasks: first a block on both sides, passed on
    through one buffer, with the attention of one batch; then a part of both heads with the logits
    of some tokens and float64 copies of them.

    Args:
        config: configuration of both sides.
        batch: sequences per forward pass.
        length: tokens of the longest sequence.
        states: bytes of the hidden states on both sides that share one pass over the weights.
        scored: tokens of a batch whose log-probabilities are asked for.
    """
    one_block = _block_bytes(config)
    computing = batch * length * (8 * config.n_head * length + 24 * config.n_embd)
    part = 4 * PART * config.n_embd
    logits = 32 * min(scored, config.n_positions) * min(PART, config.vocab_size)
    heading = one_block + 3 * part + logits
    return round(_BOTH_FRAMEWORKS + states + max(4.3 * one_block + computing, heading))


def export_memory(config: GPTJConfig, dtype: str) -> int:
    """Return the peak memory of `gptj export saved-model`: all weights in this dtype, the largest
    one three times more while it is read, laid out and assigned, and the graphs. Measured at the
    6B's width, with 2 and 3 blocks in float32 and bfloat16."""
    rows = table(config)
    held = sum(t.size for t in rows) + 3 * max(t.size for t in rows)
    graphs = _GRAPHS + config.n_layer * _BLOCK_GRAPHS
    return _TENSORFLOW + _COMPILER + graphs + NUMPY[dtype].itemsize * held


def training_state(config: GPTJConfig, trained: Sequence[Tensor] | None = None) -> int:
    """Return the memory of weights and, for each trained weight, of its gradient, the two slots of
    Adam and the gradient without the loss scale; all in float32, 20 bytes per parameter if all are
    trained. While a checkpoint is saved, its largest tensor is held twice.

    Measured 2026-11 on 2 cores: 19.7 bytes per parameter, from the difference between models of 162
    and 106 million; `benchmarks/training.py` prints the peak.

    Args:
        config: configuration of the model.
        trained: trained rows of the table, or rows of an adapter, which come on top; None trains
            the whole table.
    """
    rows = table(config)
    trained = rows if trained is None else trained
    held = sum(t.size for t in {*rows, *trained})
    return 4 * held + 16 * sum(t.size for t in trained) + 2 * 4 * max(t.size for t in rows)


def device_state(
    rows: Iterable[Tensor],
    mesh: Mesh,
    *,
    trained: Sequence[Tensor],
    slots: int,
    of_others: str = "float32",
    of_gradients: str = "float32",
    of_slots: str = "float32",
    accumulated: bool = False,
    shard_weights: bool = False,
) -> dict[str, int]:
    """Return the bytes that each device of a mesh holds in training, beside activations.

    Args:
        rows: every row of the model and of its adapter.
        mesh: mesh that `gptj_model.sharding.check_divides` accepts.
        trained: trained rows.
        slots: number of slots per trained weight.
        of_others: dtype of the matrices that are not trained.
        of_gradients: dtype of the gradients of the blocks' matrices.
        of_slots: dtype of the slots.
        accumulated: whether the gradients of several batches are summed in float32 beside those of
            one.
        shard_weights: whether weights are divided along the mesh's batch axis too.
    """

    def size(tensors: Iterable[Tensor], dtype: Callable[[Tensor], str]) -> int:
        parts = ((part_size(t, mesh, shard_weights=shard_weights), dtype(t)) for t in tensors)
        return sum(count * NUMPY[name].itemsize for count, name in parts)

    def wide(tensor: Tensor) -> str:
        return "float32"

    others = set(rows) - set(trained)
    in_block = {t for t in trained if t.block is not None and len(t.shape) > 1}
    return {
        "weights": size(trained, wide)
        + size(others, lambda t: of_others if len(t.shape) > 1 else "float32"),
        "gradients": size(trained, lambda t: of_gradients if t in in_block else "float32")
        + (size(trained, wide) if accumulated else 0),
        "slots": slots * size(trained, lambda t: of_slots),
    }


def sequence_activations(config: GPTJConfig, length: int | None = None) -> int:
    """Return the memory of the activations of one sequence in float32; None stands for full length.

    A block keeps 8.5 arrays of T × D, 2 of T × F and three of H × T × T (scores, their softmax, its
    product with dropout); the head keeps three of T × V (logits, their softmax, the gradient).
    """
    T = length or config.n_positions
    return T * (config.n_layer * _activations(config, T) + 12 * config.vocab_size)


def _activations(config: GPTJConfig, length: int) -> int:
    """Return the memory of a block's activations per token of a sequence of this length, in
    float32."""
    return 34 * config.n_embd + 8 * config.ffn_dim + 12 * config.n_head * length


def training_memory(
    config: GPTJConfig,
    batch: int,
    trained: Sequence[Tensor] | None = None,
    *,
    length: int | None = None,
) -> int:
    """Return the peak memory of `gptj train` with `batch` sequences per step, of `length` tokens or
    of full length; see `training_state`."""
    state = training_state(config, trained)
    return _TENSORFLOW + _COMPILER + state + batch * sequence_activations(config, length)


def streamed_training_memory(config: GPTJConfig, batch: int, length: int) -> int:
    """Return the peak memory of `gptj train --execution streaming`, which is independent of the
    number of blocks.

    While the gradients of a block are computed, memory holds its weights, those of the next block,
    its gradients twice (the last ones are being written), and its activations. The head takes less:
    two blocks, itself and its gradient, and the logits of some tokens.

    Args:
        config: configuration of the model.
        batch: sequences per forward pass; the number of accumulated batches does not matter.
        length: tokens per sequence.
    """
    one_block = _block_bytes(config)
    # Activations of the backward pass; the factor is measured at the 6B's width.
    backwards = 4 * one_block + round(1.4 * batch * length * _activations(config, length))
    vocabulary = 4 * config.vocab_size * config.n_embd
    logits = 2 * 4 * min(batch * length * config.vocab_size, 2**27)
    headwards = 2 * (one_block + vocabulary) + logits + 3 * 4 * PART * config.n_embd
    return _TENSORFLOW + _COMPILER + max(backwards, headwards)


def streamed_memory(
    config: GPTJConfig,
    *,
    stored: str,
    batch: int,
    length: int,
    states: int,
    kept: Residency = NOTHING_RESIDENT,
) -> int:
    """Return the peak memory of a forward pass that streams blocks from disk, which their number
    alone does not change.

    While a block computes, memory holds its weights and those of the next block as they are stored.
    Beside them it holds first the scores and their softmax with six arrays of T × D, then a part of
    the head, twice as it is stored and once as it is computed with, and six arrays of its logits.
    The factors are measured at the 6B's width, with 2 and 28 blocks.

    Args:
        config: configuration of the model.
        stored: dtype of the weights on disk.
        batch: sequences per forward pass.
        length: tokens per sequence.
        states: bytes that last from block to block: hidden states, or the caches.
        kept: blocks and head that stay in memory.
    """
    one_block = _block_bytes(config)
    share = NUMPY[stored].itemsize / 4
    computing = batch * length * (8 * config.n_head * length + 24 * config.n_embd)
    part = min(PART, config.vocab_size)
    heading = (1 + 2 * share) * 4 * part * config.n_embd + 6 * 4 * length * part
    staying = kept.blocks * one_block + kept.head * _head_bytes(config)
    working = (1 + share) * one_block + max(computing, heading)
    return _TENSORFLOW + _COMPILER + round(working) + states + staying


def residency_within(budget: int, config: GPTJConfig, *, least: int) -> Residency:
    """Return what can stay in memory: first the head, which is not prefetched, then blocks.

    Args:
        budget: bytes that may be used.
        config: configuration of the model.
        least: bytes that are used if nothing stays, see `streamed_memory`; at most the budget.
    """
    one_block = _block_bytes(config)
    room = budget - least
    head = room >= _head_bytes(config)
    room -= head * _head_bytes(config)
    return Residency(blocks=min(config.n_layer, room // one_block), head=head)


def cache_bytes(config: GPTJConfig, batch: int, length: int) -> int:
    """Return the memory of the keys and values of every block, and of three more while one is
    computed; in float32."""
    return (config.n_layer + 3) * 2 * 4 * batch * length * config.n_embd


def _block_bytes(config: GPTJConfig) -> int:
    """Return the size of a block's weights in float32."""
    return 4 * sum(t.size for t in block(config, 0))


def _head_bytes(config: GPTJConfig) -> int:
    """Return the size of the head's weight and bias in float32."""
    return 4 * config.vocab_size * (config.n_embd + 1)


def streamed_scratch(config: GPTJConfig, tokens: int, kept: int) -> int:
    """Return the disk space that a streamed step needs beside the run's checkpoints.

    Args:
        config: configuration of the model.
        tokens: number of tokens per step, whose hidden states are kept before each block and after
            the last.
        kept: bytes of gradients that wait for the norm of all gradients.
    """
    return 4 * tokens * config.n_embd * (config.n_layer + 1) + kept


def parameters(config: GPTJConfig) -> int:
    """Return the number of the model's weights."""
    return sum(t.size for t in table(config))


def token_flops(config: GPTJConfig, length: int, trained: Sequence[Tensor] | None = None) -> float:
    """Return the floating-point operations that training takes per token: the forward pass, and the
    backward pass for inputs and for trained weights, including attention over half a sequence of
    this length. The operations of an adapter, a thousandth of all, are ignored, and so are layers
    before the first trained one, which need no backward pass."""
    embedded = config.vocab_size * config.n_embd
    multiplied = parameters(config) - (0 if config.tie_word_embeddings else embedded)
    updated = multiplied
    if trained is not None:
        counted = (t for t in trained if config.tie_word_embeddings or t.hf != EMBEDDING.hf)
        updated = sum(t.size for t in counted)
    attention = config.n_layer * config.n_embd * length
    return 2 * (2 * multiplied + updated + 3 * attention)


def logits_seconds(config: GPTJConfig, tokens: int, rates: Rates) -> float:
    """Return the time of verify's level logits in seconds: two operations per weight and token, on
    both sides."""
    return 2 * 2 * parameters(config) * tokens / rates.multiplication


def step_seconds(config: GPTJConfig, batch: int, rates: Rates) -> float:
    """Return the time of one training step in seconds: the forward pass, and the backward pass for
    inputs and weights."""
    return 3 * 2 * parameters(config) * batch * config.n_positions / rates.multiplication
