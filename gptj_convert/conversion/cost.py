"""Memory and time of converting and comparing weights, by formula from a plan.

Sizes are in bytes, times in seconds. The costs of running models are in
`gptj_convert.resources.footprint`.
"""

from __future__ import annotations

from collections.abc import Iterable

from gptj_convert.conversion.plan import Plan
from gptj_convert.resources.footprint import INTERPRETER, TOKENIZER
from gptj_convert.resources.rates import Rates
from gptj_convert.streams.strips import (
    CONVERTED_STRIP_BUFFERS,
    PANEL_BYTES,
    SMALL_STRIP_BYTES,
    STRIP_BUFFERS,
    strip_buffers,
    strip_sizes,
)
from gptj_convert.streams.writer import BLOCK_BYTES, BLOCKS
from gptj_model.dtypes import NUMPY
from gptj_model.op import Op
from gptj_model.source import TensorInfo


def conversion_memory(plan: Plan) -> int:
    """Return the peak memory of `execute`: strips and blocks, and one panel more for columns, which
    are cut from whole rows."""
    sizes = [size for m in plan.in_file_order for size in strip_sizes(m.source, m.op)]
    strips = _strips(sizes, strip_buffers(max(sizes, default=0)))
    blocks = min(plan.layout.total, BLOCKS * BLOCK_BYTES)
    return INTERPRETER + TOKENIZER + strips + blocks + PANEL_BYTES


def comparison_memory(pairs: Iterable[tuple[TensorInfo, Op, TensorInfo]]) -> int:
    """Return the peak memory of verify's level weights, for two sides that are equal.

    Strips of the source are in use as in a conversion; strips of the converted side are one panel
    each. One panel more is laid out, and compared through a mask of one byte per element. The hash
    reads pieces of half a panel.

    Args:
        pairs: source, op and target of each tensor, in the order of the converted file.
    """
    sizes: list[int] = []
    target_bytes = mask = 0
    for source, op, target in pairs:
        sizes += strip_sizes(source, op)
        target_bytes += target.nbytes
        mask = max(mask, PANEL_BYTES // NUMPY[target.dtype].itemsize)
    panels = min(target_bytes, (CONVERTED_STRIP_BUFFERS + 2) * PANEL_BYTES)
    return INTERPRETER + TOKENIZER + _strips(sizes, STRIP_BUFFERS) + panels + mask


def _strips(sizes: Iterable[int], count: int) -> int:
    """Return the memory of `count` strips that are used in turn, each of which grows to the largest
    it holds."""
    large = [size for size in sizes if size > SMALL_STRIP_BYTES]
    return sum(max(large[n::count], default=0) for n in range(count))


def conversion_seconds(plan: Plan, rates: Rates, cores: float) -> float:
    """Return the time of `execute`: that of its slowest stage, or of all stages if there are too
    few cores.

    The disk is assumed to read as fast as it writes, and to do one at a time.
    """
    moved = sum(m.target.nbytes for m in plan.moves if m.op is Op.TRANSPOSE)
    # Checksums and counts of values that are not finite run at about the speed of transposition.
    computing = (
        plan.source_bytes / rates.transposition,
        moved / rates.transposition,
        plan.layout.total / rates.sha256,
    )
    disk = (plan.source_bytes + plan.layout.total) / rates.write
    return max(*computing, disk, sum(computing) / cores)


def comparison_seconds(plan: Plan, rates: Rates) -> float:
    """Return the time of verify's level weights after that conversion: one thread lays out,
    compares and hashes."""
    # Comparing moves about as many bytes as laying out.
    return 2 * plan.target_bytes / rates.transposition + plan.layout.total / rates.sha256
