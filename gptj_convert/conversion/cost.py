"""Memory and time that converting and comparing weights take, by formula from a plan.

Sizes are in bytes, times in seconds. What the models themselves take is in
`gptj_convert.resources.footprint`.
"""

from __future__ import annotations

from collections.abc import Iterable

from gptj_convert.conversion.plan import Plan
from gptj_convert.resources.footprint import INTERPRETER, TOKENIZER
from gptj_convert.resources.rates import Rates
from gptj_convert.streams.strips import (
    CONVERTED_STRIPS,
    PANEL_BYTES,
    SMALL_STRIP_BYTES,
    STRIPS,
    strip_sizes,
    strips_around,
)
from gptj_convert.streams.writer import BLOCK_BYTES, BLOCKS
from gptj_model.dtypes import NUMPY
from gptj_model.op import Op
from gptj_model.source import TensorInfo


def conversion_memory(plan: Plan) -> int:
    """Peak of `execute`: strips and blocks; columns are cut from whole rows in a panel more."""
    sizes = [size for m in plan.in_file_order for size in strip_sizes(m.source, m.op)]
    strips = _strips(sizes, strips_around(max(sizes, default=0)))
    blocks = min(plan.layout.total, BLOCKS * BLOCK_BYTES)
    return INTERPRETER + TOKENIZER + strips + blocks + PANEL_BYTES


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
    panels = min(target_bytes, (CONVERTED_STRIPS + 2) * PANEL_BYTES)
    return INTERPRETER + TOKENIZER + _strips(sizes, STRIPS) + panels + mask


def _strips(sizes: Iterable[int], count: int) -> int:
    """Of strips that go around in turn: each buffer grows to the largest of every so many."""
    large = [size for size in sizes if size > SMALL_STRIP_BYTES]
    return sum(max(large[n::count], default=0) for n in range(count))


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
