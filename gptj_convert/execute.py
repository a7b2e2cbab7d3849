"""Carry out a plan: read, transform, write, in bounded memory and without TensorFlow or torch."""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from crc32c import crc32c

from gptj_convert.checkpoint import Checkpoint
from gptj_convert.formats import hf, tf
from gptj_convert.manifest import MANIFEST_FILE, Manifest, describe_file, describe_target
from gptj_convert.panels import Panels
from gptj_convert.plan import Move, Plan, target_tensors
from gptj_convert.reference_yaml import PARAMS_FILE, continued_pretraining, yaml_text
from gptj_convert.staging import staged_folder
from gptj_model.config import CONFIG_FILE
from gptj_model.dtypes import FLOAT16_MAX, NUMPY, overflows
from gptj_model.errors import FileFault, TensorFault
from gptj_model.source import raw_bytes
from gptj_model.tensors import GLOBAL_STEP, Scheme

WORKERS = 2
#: Bytes of the small files beside the weights, generously.
_SMALL_FILES = 16 * 2**20


class TensorSink(Protocol):
    """A new file of tensors, written in any order."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Put `data` at byte `offset` of a tensor; threads may do so at once."""
        ...

    def finish(self, checksums: dict[str, int]) -> None:
        """Make it durable; `checksums` are the crc32c of every tensor's bytes."""
        ...

    def close(self) -> None:
        """Close it, finished or not."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of the source that are done, of how many, and what is being done."""

    done: int
    total: int
    what: str


def check_space(plan: Plan, out: Path) -> None:
    """Refuse before the first byte what the disk cannot hold.

    Raises:
        FileFault: with bytes needed and free.
    """
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    needed, free = plan.target_bytes + _SMALL_FILES, shutil.disk_usage(folder).free
    if needed > free:
        raise FileFault(
            f"{folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            hint="free some space, or choose a folder on another disk with --out",
        )


def execute(
    plan: Plan, checkpoint: Checkpoint, out: Path, *, force: bool = False
) -> Iterator[Progress]:
    """Write the converted checkpoint to `out`, which appears when it is complete.

    Yields progress as it goes; nothing happens before the first is asked for.

    Raises:
        UsageError: `out` exists and `force` is off.
        FileFault: the source is cut short, or the disk too small.
        TensorFault: a value does not fit the target's dtype.
        OSError: writing fails.
    """
    with staged_folder(out, force=force) as staging:
        check_space(plan, out)
        if plan.scheme is Scheme.TF:
            sink = tf.create_bundle(staging, target_tensors(plan))
        else:
            sink = hf.create_weights(staging, target_tensors(plan), plan.max_shard_bytes)
        try:
            checksums = yield from _move_all(plan, checkpoint, sink)
            target_crcs = {m.target_name: checksums[m.tensor.hf][1] for m in plan.moves}
            if plan.scheme is Scheme.TF:
                step = raw_bytes(np.zeros((), np.int64))
                sink.write(GLOBAL_STEP, 0, step)
                target_crcs[GLOBAL_STEP] = crc32c(step)
            sink.finish(target_crcs)
        finally:
            sink.close()
        _write_companions(plan, checkpoint, staging)
        yield Progress(plan.source_bytes, plan.source_bytes, "hashing the result")
        manifest = _manifest(plan, checkpoint, staging, checksums)
        (staging / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


def _move_all(plan: Plan, checkpoint: Checkpoint, sink: TensorSink) -> Iterator[Progress]:
    """Move every tensor with a few threads; returns crc32c of source and result by HF name."""
    events: queue.SimpleQueue[tuple[int, str] | Future] = queue.SimpleQueue()
    stop = threading.Event()
    checksums: dict[str, tuple[int, int]] = {}
    done = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for move in plan.moves:
                future = pool.submit(_move, move, checkpoint, sink, events, stop)
                future.add_done_callback(events.put)
            left = len(plan.moves)
            while left:
                event = events.get()
                if isinstance(event, Future):
                    hf_name, pair = event.result()
                    checksums[hf_name] = pair
                    left -= 1
                else:
                    done += event[0]
                    yield Progress(done, plan.source_bytes, event[1])
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return checksums


def _move(
    move: Move,
    checkpoint: Checkpoint,
    sink: TensorSink,
    events: queue.SimpleQueue,
    stop: threading.Event,
) -> tuple[str, tuple[int, int]]:
    panels = Panels(checkpoint.source, move.source_name, move.op)
    dtype = NUMPY[move.target.dtype]
    offset = crc = 0
    for values in panels:
        if stop.is_set():
            break
        if overflows(values, move.target.dtype):
            raise TensorFault(
                str(checkpoint.path),
                [
                    f"{move.source_name!r} holds a value beyond ±{FLOAT16_MAX:g}, "
                    f"which {move.target.dtype} cannot hold"
                ],
                hint="convert with --dtype float32 or bfloat16",
            )
        raw = raw_bytes(values.astype(dtype, copy=False))
        crc = crc32c(raw, crc)
        sink.write(move.target_name, offset, raw)
        offset += len(raw)
        events.put((values.nbytes, move.tensor.hf))
    return move.tensor.hf, (panels.crc, crc)


def _write_companions(plan: Plan, checkpoint: Checkpoint, staging: Path) -> None:
    config = json.dumps(plan.config.to_hf(dtype=plan.dtype), indent=2) + "\n"
    (staging / CONFIG_FILE).write_text(config, encoding="utf-8")
    if plan.scheme is Scheme.TF:
        params = yaml_text(continued_pretraining(plan.config))
        (staging / PARAMS_FILE).write_text(params, encoding="utf-8")
    for path in checkpoint.companions:
        shutil.copyfile(path, staging / path.name)


def _manifest(
    plan: Plan,
    checkpoint: Checkpoint,
    staging: Path,
    checksums: dict[str, tuple[int, int]],
) -> Manifest:
    written = sorted(p for p in staging.iterdir() if p.name != PARAMS_FILE)
    return Manifest(
        source={
            "path": str(checkpoint.path.absolute()),
            "format": checkpoint.scheme.value,
            "vocab_size": checkpoint.vocab_choice,
            "files": {p.name: {"bytes": p.stat().st_size} for p in checkpoint.files},
        },
        target=describe_target(plan),
        files={p.name: describe_file(p) for p in written},
        tensors={
            m.tensor.hf: {
                "source_crc32c": f"{checksums[m.tensor.hf][0]:08x}",
                "crc32c": f"{checksums[m.tensor.hf][1]:08x}",
            }
            for m in plan.moves
        },
    )
