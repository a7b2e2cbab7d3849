"""What memory, disk and time each command needs, by formula, from headers and a config alone.

Nothing here asks the machine: what there is says `gptj_convert.resources.machine`, how fast it is
`gptj_convert.resources.rates`. All sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gptj_convert.streams.strips import (
    CONVERTED_STRIP_BUFFERS,
    PANEL_BYTES,
    SMALL_STRIP_BYTES,
    STRIP_BUFFERS,
    strip_buffers,
    strip_sizes,
)
from gptj_convert.streams.writer import BLOCK_BYTES, BLOCKS
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.op import Op
from gptj_model.sharding import Mesh, part_size
from gptj_model.source import TensorInfo
from gptj_model.streaming.residency import NOTHING_KEPT, Kept
from gptj_model.tensors import EMBEDDING, Tensor, block, table
from gptj_model.vocabulary import PART

if TYPE_CHECKING:
    from gptj_convert.conversion.plan import Plan
    from gptj_convert.resources.rates import Rates

#: The interpreter with numpy and the command line, measured.
INTERPRETER = 45_000_000
#: `gptj download`, measured: the client, and one piece of 1 MiB at a time.
DOWNLOAD = 200_000_000
#: TensorFlow with Keras, and torch with transformers beside it, measured: imported and warm.
_TENSORFLOW = 600_000_000
_BOTH_FRAMEWORKS = 960_000_000
#: What compiling a step has taken, and not given back, measured.
_COMPILER = 200_000_000
#: Parsed JSON of a tokenizer, by the size of GPT-J's vocabulary, measured.
_TOKENIZER = 15_000_000

#: Checkpoints that the params.yaml of a conversion keeps of a run.
KEPT_CHECKPOINTS = 2


def conversion_memory(plan: Plan) -> int:
    """Peak of `execute`: strips and blocks; columns are cut from whole rows in a panel more."""
    sizes = [size for m in plan.in_file_order for size in strip_sizes(m.source, m.op)]
    strips = _strips(sizes, strip_buffers(max(sizes, default=0)))
    blocks = min(plan.layout.total, BLOCKS * BLOCK_BYTES)
    return INTERPRETER + _TOKENIZER + strips + blocks + PANEL_BYTES


def comparison_memory(pairs: Iterable[tuple[TensorInfo, Op, TensorInfo]]) -> int:
    """Peak of verify's level weights, on sides that are equal.

    Strips of the source go around as in a conversion; of the converted side they are a panel
    each. One panel more is laid out, and compared by a mask of a byte an element. The hash reads
    pieces of half a panel.

    Args:
        pairs: source, what is done to it, and target of each tensor, in the order of the
            converted file.
    """
    sizes: list[int] = []
    target_bytes = mask = 0
    for source, op, target in pairs:
        sizes += strip_sizes(source, op)
        target_bytes += target.nbytes
        mask = max(mask, PANEL_BYTES // NUMPY[target.dtype].itemsize)
    panels = min(target_bytes, (CONVERTED_STRIP_BUFFERS + 2) * PANEL_BYTES)
    return INTERPRETER + _TOKENIZER + _strips(sizes, STRIP_BUFFERS) + panels + mask


def _strips(sizes: Iterable[int], count: int) -> int:
    """Of strips that go around in turn: each buffer grows to the largest of every so many."""
    large = [size for size in sizes if size > SMALL_STRIP_BYTES]
    return sum(max(large[n::count], default=0) for n in range(count))


def logits_memory(config: GPTJConfig, lengths: Sequence[int]) -> int:
    """Peak of verify's level logits: while a block is loaded, or the logits are compared.

    First both blocks are there, in float32, the reference's once more in float64 for the noise
    floor, and what one is read and handed over in; then what TensorFlow has not given back of
    them, a part of both heads, the logits of all prompts on both sides, and copies of the longest
    in float64. The factors are measured at the 6B's width, not read from TensorFlow.

    Args:
        config: of both sides.
        lengths: of the prompts, in tokens; the hidden states of both sides are kept.
    """
    one_block = _block_bytes(config)
    part = 4 * PART * config.n_embd
    states = 2 * 4 * sum(lengths) * config.n_embd
    logits = 8 * sum(lengths) * config.vocab_size
    loading = 5.1 * one_block
    comparing = 2 * one_block + 3 * part + logits + 8 * max(lengths) * config.vocab_size
    return round(_BOTH_FRAMEWORKS + states + max(loading, comparing))


def gradients_memory(config: GPTJConfig) -> int:
    """Peak of verify's level gradients: a block and its gradients on both sides, in float32, and
    copies of them on the way. The factor is measured at the 6B's width."""
    return round(_BOTH_FRAMEWORKS + 10 * _block_bytes(config))


def training_state(config: GPTJConfig, trained: Sequence[Tensor] | None = None) -> int:
    """Weights; of those that are trained, gradients, the two slots of Adam, and the gradients once
    more without the loss scale; all in float32: 20 bytes a parameter if all are. While one is
    saved, its largest tensor twice.

    Measured: 19.7 bytes for each parameter that 162 million have more than 106 million.

    Args:
        config: of the model.
        trained: rows of the table, or of an adapter, which comes on top; None: the whole table.
    """
    rows = table(config)
    trained = rows if trained is None else trained
    held = sum(t.size for t in {*rows, *trained})
    return 4 * held + 16 * sum(t.size for t in trained) + 2 * 4 * max(t.size for t in rows)


def device_state(
    config: GPTJConfig, mesh: Mesh, *, trained: Sequence[Tensor], slots: int, accumulated: bool
) -> dict[str, int]:
    """What each device of a mesh holds of a model in training, in float32, beside activations.

    Args:
        config: of the model.
        mesh: see `gptj_model.sharding.check_divides`.
        trained: rows of the table.
        slots: of a trained weight.
        accumulated: gradients of several batches are added up, beside those of one.
    """
    held = 4 * sum(part_size(t, mesh) for t in table(config))
    updated = 4 * sum(part_size(t, mesh) for t in trained)
    return {
        "weights": held,
        "gradients": updated * (2 if accumulated else 1),
        "slots": updated * slots,
    }


def sequence_activations(config: GPTJConfig, length: int | None = None) -> int:
    """What one sequence keeps for the gradients, in float32; None: one of full length.

    A block keeps 8.5 arrays of T × D and 2 of T × F, three of H × T × T (scores, their softmax,
    its product with dropout); the head three of T × V (logits, their softmax, the gradient).
    """
    T = length or config.n_positions
    return T * (config.n_layer * _activations(config, T) + 12 * config.vocab_size)


def _activations(config: GPTJConfig, length: int) -> int:
    """What a block computes for one token of a sequence of this length, in float32."""
    return 34 * config.n_embd + 8 * config.ffn_dim + 12 * config.n_head * length


def training_memory(
    config: GPTJConfig,
    batch: int,
    trained: Sequence[Tensor] | None = None,
    *,
    length: int | None = None,
) -> int:
    """Peak of `gptj train` with so many sequences a step, of so many tokens or of full length; see
    `training_state`."""
    state = training_state(config, trained)
    return _TENSORFLOW + _COMPILER + state + batch * sequence_activations(config, length)


def streamed_training_memory(config: GPTJConfig, batch: int, length: int) -> int:
    """Peak of `gptj train --execution streaming`, which the number of blocks does not change.

    While a block's gradients are computed, its weights are there, those of the next one, and its
    gradients twice, the last ones on their way to the disk; and what the block computes. Less is
    there for the head: two blocks, itself and its gradient, and logits of a part of the tokens.

    Args:
        config: of the model.
        batch: sequences of one forward pass; how many are accumulated does not matter.
        length: of a sequence, in tokens.
    """
    one_block = _block_bytes(config)
    # What is computed backwards: the factor is measured at the 6B's width.
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
    kept: Kept = NOTHING_KEPT,
) -> int:
    """Peak of a forward pass that brings blocks from the disk, which their number alone does not
    change.

    While a block computes its weights are there, and those of the next one as they are stored.
    Beside them are first scores and their softmax with six arrays of T × D; then a part of the
    head, twice as it is stored and once as it is laid out, and six arrays of its logits. The
    factors are measured at the 6B's width, with 2 and 28 blocks.

    Args:
        config: of the model.
        stored: the dtype of its weights on the disk.
        batch: sequences that are computed together.
        length: of a sequence, in tokens.
        states: bytes of what lasts from block to block: hidden states, or the caches.
        kept: what stays in memory beside.
    """
    one_block = _block_bytes(config)
    share = NUMPY[stored].itemsize / 4
    computing = batch * length * (8 * config.n_head * length + 24 * config.n_embd)
    part = min(PART, config.vocab_size)
    heading = (1 + 2 * share) * 4 * part * config.n_embd + 6 * 4 * length * part
    staying = kept.blocks * one_block + kept.head * _head_bytes(config)
    working = (1 + share) * one_block + max(computing, heading)
    return _TENSORFLOW + _COMPILER + round(working) + states + staying


def kept_within(budget: int, config: GPTJConfig, *, least: int) -> Kept:
    """What can stay in memory: the head first, which is not read ahead, then blocks.

    Args:
        budget: bytes that may be taken.
        config: of the model.
        least: what is taken if nothing stays, see `streamed_memory`; not more than the budget.
    """
    one_block = _block_bytes(config)
    room = budget - least
    head = room >= _head_bytes(config)
    room -= head * _head_bytes(config)
    return Kept(blocks=min(config.n_layer, room // one_block), head=head)


def cache_bytes(config: GPTJConfig, batch: int, length: int) -> int:
    """Keys and values of every block, and of three more while one is computed; in float32."""
    return (config.n_layer + 3) * 2 * 4 * batch * length * config.n_embd


def _block_bytes(config: GPTJConfig) -> int:
    """Its weights in float32."""
    return 4 * sum(t.size for t in block(config, 0))


def _head_bytes(config: GPTJConfig) -> int:
    """Its weight and bias in float32."""
    return 4 * config.vocab_size * (config.n_embd + 1)


def streamed_scratch(config: GPTJConfig, tokens: int, kept: int) -> int:
    """Bytes of disk that a streamed step needs beside its states.

    Args:
        config: of the model.
        tokens: of the step, whose hidden states are kept before each block and after the last.
        kept: bytes of the gradients that wait for the norm of all.
    """
    return 4 * tokens * config.n_embd * (config.n_layer + 1) + kept


def parameters(config: GPTJConfig) -> int:
    """Number of the model's weights."""
    return sum(t.size for t in table(config))


def token_flops(config: GPTJConfig, length: int, trained: Sequence[Tensor] | None = None) -> float:
    """Floating-point operations that training needs for a token: forwards, and backwards for
    inputs and for weights that are trained; the attention over half a sequence of this length
    included. What an adapter itself computes, a thousandth, and layers before the first that is
    trained, which need nothing backwards, are not looked at."""
    embedded = config.vocab_size * config.n_embd
    multiplied = parameters(config) - (0 if config.tie_word_embeddings else embedded)
    updated = multiplied
    if trained is not None:
        counted = (t for t in trained if config.tie_word_embeddings or t.hf != EMBEDDING.hf)
        updated = sum(t.size for t in counted)
    attention = config.n_layer * config.n_embd * length
    return 2 * (2 * multiplied + updated + 3 * attention)


def conversion_seconds(plan: Plan, rates: Rates, cores: float) -> float:
    """Of `execute`: that of its slowest stage, or of all that compute on too few cores.

    The disk is taken to be read as fast as it is written, and to do one at a time.
    """
    moved = sum(m.target.nbytes for m in plan.moves if m.op is Op.TRANSPOSE)
    # Checksums and counts of what is not finite are about as fast as laying out.
    computing = (
        plan.source_bytes / rates.transposition,
        moved / rates.transposition,
        plan.layout.total / rates.sha256,
    )
    disk = (plan.source_bytes + plan.layout.total) / rates.write
    return max(*computing, disk, sum(computing) / cores)


def comparison_seconds(plan: Plan, rates: Rates) -> float:
    """Of verify's level weights after that conversion: one thread lays out, compares, hashes."""
    # Comparing moves about as many bytes as laying out does.
    return 2 * plan.target_bytes / rates.transposition + plan.layout.total / rates.sha256


def logits_seconds(config: GPTJConfig, tokens: int, rates: Rates) -> float:
    """Of verify's level logits: two operations a weight and token, on both sides."""
    return 2 * 2 * parameters(config) * tokens / rates.multiplication


def step_seconds(config: GPTJConfig, batch: int, rates: Rates) -> float:
    """Of one step of training: forwards once, and backwards for inputs and for weights."""
    return 3 * 2 * parameters(config) * batch * config.n_positions / rates.multiplication
