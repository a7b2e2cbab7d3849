"""Checkpoints of a run, `model.ckpt-N`, in the names and the format of the reference.

A checkpoint counts once its index file exists, which is written last. Nothing older is deleted
before that, and nothing that is not listed here is ever deleted.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from gptj_convert.files.output_folder import sync
from gptj_convert.files.ranged_file import RangedFile
from gptj_convert.files.whole_file import PARTIAL, write_whole
from gptj_convert.formats.containers.leveldb_table import masked
from gptj_convert.formats.containers.tensor_bundle import (
    BundleSource,
    BundleWriter,
    data_path,
    index_path,
)
from gptj_convert.formats.layouts.tf import (
    RUN_PREFIX,
    STATE_FILE,
    read_best,
    read_state,
    state_text,
)
from gptj_model.errors import FileFault, TrainingFault
from gptj_model.source import TensorInfo, raw_bytes, read_tensor
from gptj_model.tensors import GLOBAL_STEP

_INDEX_NAME = re.compile(rf"{re.escape(RUN_PREFIX)}-(\d+)\.index")
_FILE_NAME = re.compile(rf"{re.escape(RUN_PREFIX)}-(\d+)\.(?:index|data-\d+-of-\d+)")


def steps(model_dir: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, in rising order."""
    return _numbers(model_dir, _INDEX_NAME)


def prefix(model_dir: Path, step: int) -> Path:
    """Return the path prefix of the checkpoint of a step."""
    return model_dir / f"{RUN_PREFIX}-{step}"


def step_of(name: str) -> int:
    """Return the step of the checkpoint of this name, `model.ckpt-N`."""
    return int(name.rpartition("-")[2])


def save(model_dir: Path, step: int, tensors: Mapping[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of a step durably, then delete the oldest beyond `keep` (0 keeps all).

    Args:
        model_dir: folder of the run.
        step: step of the checkpoint.
        tensors: arrays or variables; a variable is copied only while it is written.
        keep: number of checkpoints to keep.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are unchanged.
    """
    infos = {name: _info(value) for name, value in tensors.items()}
    with closing(Draft(model_dir, infos)) as draft:
        for name in infos:
            draft.append(name, np.asarray(tensors[name]))
        final = draft.publish(step)
    retain(model_dir, keep=keep)
    return final


class Draft:
    """A checkpoint that is being written, invisible until it is published.

    It is a `TensorSource` meanwhile: reading what is not yet written waits for it.

    Args:
        model_dir: folder of the run.
        tensors: dtype and shape of what it will hold, except what `publish` adds.

    Raises:
        FileFault: the disk is full or not writable.
    """

    def __init__(self, model_dir: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self._model_dir = model_dir
        self._partial = model_dir / f"{PARTIAL}{RUN_PREFIX}"
        self._grown = threading.Condition()
        self._error: BaseException | None = None
        self._published = False
        _remove(self._partial)
        with self.kept_whole():
            self._writer = BundleWriter(self._partial, tensors)
            self._file = RangedFile(data_path(self._partial))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""
        return self._writer.tensors

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Implement `TensorSource`.

        Raises:
            Exception: the error because of which the values will never be written.
        """
        writer, end = self._writer, offset + len(buffer)
        with self._grown:
            self._grown.wait_for(lambda: self._error or writer.written[name] >= end)
        if self._error:
            raise self._error
        self._file.read_into(writer.begins[name] + offset, buffer, f"tensor {name!r}")

    def append(self, name: str, values: np.ndarray) -> None:
        """Write the next part of a tensor; see `BundleWriter.append`.

        Raises:
            FileFault: the disk is full or not writable.
        """
        with self.kept_whole():
            self._writer.append(name, values)
        with self._grown:
            self._grown.notify_all()

    def publish(self, step: int, more: Mapping[str, np.ndarray] | None = None) -> Path:
        """Make it durable as the checkpoint of a step, and return its prefix.

        Args:
            step: step of the checkpoint, which is stored too.
            more: small tensors that were not known before.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are unchanged.
        """
        final = prefix(self._model_dir, step)
        with self.kept_whole():
            self._writer.finish({**(more or {}), GLOBAL_STEP: np.asarray(step, np.int64)})
            data_path(self._partial).rename(data_path(final))
            sync(self._model_dir)  # a power cut must not leave the index alone
            index_path(self._partial).rename(index_path(final))
        self._published = True
        sync(self._model_dir)
        return final

    def close(self) -> None:
        """Close the files, and discard what was not published; closing twice is harmless."""
        self._writer.close()
        self._file.close()
        if not self._published:
            _remove(self._partial)

    @contextmanager
    def kept_whole(self) -> Iterator[None]:
        """Remove a draft that fails, and wake whoever waits for it."""
        try:
            yield
        except BaseException as e:
            _remove(self._partial)
            with self._grown:
                self._error = e
                self._grown.notify_all()
            raise


def retain(model_dir: Path, *, keep: int, superseded: int | None = None) -> None:
    """Delete the oldest checkpoints beyond `keep` (0 keeps all) except the best, and list the
    others in the state file.

    Args:
        model_dir: folder of the run, with at least one checkpoint.
        keep: number of newest checkpoints to keep, beside those that best.json names.
        superseded: step whose checkpoint is deleted unless it is among the best.

    Raises:
        FileFault: best.json is damaged; nothing is deleted.
    """
    best = set(read_best(model_dir))
    existing = steps(model_dir)
    protected = {step for step in existing if prefix(model_dir, step).name in best}
    known = [step for step in existing if step != superseded or step in protected]
    newest = known[-keep:] if keep else known
    _write_state(model_dir, [s for s in known if s >= newest[0] or s in protected])
    # A run that was killed while it wrote or deleted leaves data without an index.
    for old in _numbers(model_dir, _FILE_NAME):
        if (old == superseded or old < newest[0]) and old not in protected:
            _remove(prefix(model_dir, old))


def open_newest(
    model_dir: Path, *, strict: bool, warn: Callable[[str], None]
) -> tuple[int, BundleSource]:
    """Return step and content of the newest checkpoint whose checksums match.

    Args:
        model_dir: folder of the run.
        strict: whether only the newest is accepted.
        warn: is called with a message about each newer one that is damaged.

    Raises:
        TrainingFault: all are damaged or, if `strict`, the newest is.
    """
    found = steps(model_dir)
    _check_state(model_dir, found)
    for step in reversed(found):
        try:
            source = BundleSource(prefix(model_dir, step))
            _check(source)
        except FileFault as e:
            if strict:
                raise TrainingFault(
                    f"newest checkpoint is damaged: {e.message}",
                    hint="without --strict the one before it is used",
                ) from None
            warn(f"checkpoint of step {step} is damaged and passed over: {e.message}")
            continue
        return step, source
    raise TrainingFault(
        f"{model_dir}: none of its checkpoints is whole, and a run is not begun again in silence",
        hint="name another --model-dir, or restore a checkpoint from a copy",
    )


def _check(source: BundleSource) -> None:
    for name, entry in source.entries.items():
        if masked(crc32c(raw_bytes(read_tensor(source, name)))) != entry.crc:
            raise FileFault(f"{source.prefix}: tensor {name!r}: its checksum is wrong")


def _check_state(model_dir: Path, found: list[int]) -> None:
    named = read_state(model_dir)
    if named and not found:
        raise TrainingFault(
            f"{model_dir / STATE_FILE}: names {named[-1]}, but no checkpoint is in that folder",
            hint="name another --model-dir, or restore a checkpoint from a copy",
        )


def _write_state(model_dir: Path, kept: list[int]) -> None:
    text = state_text([prefix(model_dir, s).name for s in kept])
    write_whole(model_dir / STATE_FILE, text)


def _info(value: Any) -> TensorInfo:
    """Return dtype and shape of an array, or of a Keras or TensorFlow variable."""
    name = value.dtype if isinstance(value.dtype, str) else value.dtype.name
    return TensorInfo(name, tuple(value.shape))


def _numbers(model_dir: Path, name: re.Pattern[str]) -> list[int]:
    """Return the steps in the names of files, in rising order."""
    if not model_dir.is_dir():
        return []
    matches = (name.fullmatch(p.name) for p in model_dir.iterdir())
    return sorted({int(m.group(1)) for m in matches if m})


def _remove(bundle: Path) -> None:
    index_path(bundle).unlink(missing_ok=True)
    for path in bundle.parent.glob(f"{bundle.name}.data-*"):
        path.unlink()
