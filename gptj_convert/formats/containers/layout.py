"""Where every byte of a new checkpoint goes, known before the first is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gptj_model.source import TensorInfo


@dataclass(frozen=True, slots=True)
class FileLayout:
    """One file: its parts one after the other, without gaps."""

    name: str
    parts: tuple[bytes | str, ...]
    """Bytes as they are, or the name of a tensor whose bytes come here."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The large files of a checkpoint, and the small ones that complete it."""

    tensors: Mapping[str, TensorInfo]
    files: tuple[FileLayout, ...]
    index: Callable[[Mapping[str, int]], Mapping[str, bytes]]
    """From the crc32c of every tensor's bytes to the name and content of each small file."""

    def spans(self, file: FileLayout) -> Iterator[tuple[bytes | str, int, int]]:
        """The parts of a file, each with its first byte and the one after its last."""
        end = 0
        for part in file.parts:
            begin = end
            end += len(part) if isinstance(part, bytes) else self.tensors[part].nbytes
            yield part, begin, end

    def size(self, file: FileLayout) -> int:
        """Bytes of a file."""
        return max((end for _, _, end in self.spans(file)), default=0)

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.size(file) for file in self.files)

    def tensors_from(self, file: int, offset: int) -> Iterator[str]:
        """The tensors that begin at `offset` of a file, by its number, or later, in order."""
        for f in self.files[file:]:
            yield from (
                p for p, begin, _ in self.spans(f) if isinstance(p, str) and begin >= offset
            )
            offset = 0
