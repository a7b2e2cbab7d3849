"""Several sources of tensors as one."""

from __future__ import annotations

from gptj_model.source import TensorInfo, TensorSource


class JoinedSource:
    """Tensors of several sources as one `TensorSource`.

    Where names recur, the first source counts.
    """

    def __init__(self, *sources: TensorSource) -> None:
        self._sources = sources
        self._of = {name: source for source in reversed(sources) for name in source.tensors}
        self.tensors: dict[str, TensorInfo] = {n: s.tensors[n] for n, s in self._of.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Implement `TensorSource`."""
        self._of[name].read_into(name, offset, buffer)

    def close(self) -> None:
        """Close all sources."""
        for source in self._sources:
            source.close()
