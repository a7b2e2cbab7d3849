"""Answers of a model to the requests of the harness, kept in a file so that no request is computed
twice: an interrupted evaluation resumes with them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.files.json_lines import read_lines
from gptj_model.errors import FileFault
from runner.data.making.tokenizer import facts

_KEY, _ANSWER = "request", "answer"


def key_of(*request: Any) -> str:
    """Return the key of a request, which is made of JSON values."""
    return sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]


def file_of(folder: Path, checkpoint: Checkpoint, **computed: Any) -> Path:
    """Return the file in a folder for the answers of one model, computed in one way.

    Args:
        folder: folder of such files.
        checkpoint: the model.
        computed: what else answers depend on, such as the backend.
    """
    states = [(path.name, path.stat()) for path in checkpoint.files]
    weights = [[name, state.st_size, state.st_mtime_ns] for name, state in states]
    whole = checkpoint.config.to_hf(dtype=checkpoint.dtype)
    tokens = facts(checkpoint.folder)
    digest = key_of(str(checkpoint.folder.resolve()), weights, whole, tokens, computed)
    return folder / f"{checkpoint.folder.resolve().name}-{digest[:12]}.jsonl"


class KeptAnswers:
    """Answers by the keys of their requests, appended to a file as they are found.

    Use it as a context manager.

    Args:
        path: file of the answers, which is made if there is none.

    Attributes:
        reused: number of answers that were asked for and were in the file before.

    Raises:
        FileFault: another process appends to the file.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reused = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise FileFault(
                f"{path}: another process writes answers of this model there",
                hint="wait for it to end, or name another folder with --work-dir",
            ) from None
        lines = read_lines(path)  # a line that a kill has cut is left out
        self._known = {v[_KEY]: v[_ANSWER] for v in lines if v.keys() == {_KEY, _ANSWER}}
        self._before = set(self._known)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")

    def __enter__(self) -> KeptAnswers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._known)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the distinct keys that have no answer yet, in order."""
        distinct = dict.fromkeys(keys)
        self.reused += sum(key in self._before for key in distinct)
        return [key for key in distinct if key not in self._known]

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Append answers, so that a kill of this process does not lose them."""
        lines = [json.dumps({_KEY: key, _ANSWER: value}) + "\n" for key, value in answers.items()]
        self._file.write("".join(lines).encode())
        self._known.update(answers)
