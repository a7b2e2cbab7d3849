"""Place of every byte of a new checkpoint, known before the first one is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gptj_model.source import TensorInfo


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Layout of one file, whose parts follow one another without gaps."""

    name: str
    parts: tuple[bytes | str, ...]
    """Parts in order, each either literal bytes or the name of a tensor."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of a checkpoint: its large files, and the small ones that complete it."""

    tensors: Mapping[str, TensorInfo]
    files: tuple[FileLayout, ...]
    index: Callable[[Mapping[str, int]], Mapping[str, bytes]]
    """Function from the crc32c of every tensor to the content of each small file by its name."""

    def spans(self, file: FileLayout) -> Iterator[tuple[bytes | str, int, int]]:
        """Yield each part of a file with its begin and end offset, in bytes."""
        end = 0
        for part in file.parts:
            begin = end
            end += len(part) if isinstance(part, bytes) else self.tensors[part].nbytes
            yield part, begin, end

    def size(self, file: FileLayout) -> int:
        """Return the size of a file, in bytes."""
        return max((end for _, _, end in self.spans(file)), default=0)

    @property
    def total(self) -> int:
        """Size of all large files together, in bytes."""
        return sum(self.size(file) for file in self.files)

    def tensors_from(self, file: int, offset: int) -> Iterator[str]:
        """Yield the tensors from a position on, in order.

        Args:
            file: number of the file in the layout.
            offset: offset in that file, in bytes.
        """
        for f in self.files[file:]:
            yield from (
                p for p, begin, _ in self.spans(f) if isinstance(p, str) and begin >= offset
            )
            offset = 0
