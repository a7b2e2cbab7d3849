"""Tasks of the harness: found by name, loaded with their data sets, and run."""

from __future__ import annotations

import difflib
import io
import logging
import os
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partialmethod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from tqdm import tqdm

from gptj_model.errors import DataFault, GptjError, HubFault, UsageError

T = TypeVar("T")

_OFFLINE = (
    "connect to the network once, which caches the data set, or name a folder of task files with "
    "local data by --include-path DIR (docs/evaluation.md)"
)


class Tasks:
    """Tasks that are loaded with their data sets.

    Args:
        names: names of tasks, groups and tags, or patterns of them such as `mmlu_*`.
        include: folders of further task files, whose names win.
        fewshot: number of examples before each question; None leaves it to each task.

    Raises:
        UsageError: there is no such task or folder.
        HubFault: a data set is neither cached nor reachable.
        DataFault: a task or its data is not valid.
    """

    def __init__(
        self, names: Sequence[str], include: Sequence[Path] = (), fewshot: int | None = None
    ) -> None:
        manager = _manager(names, include)
        self.names = _found(names, manager, include)
        self._loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in self.names:
            found = _guarded(f"task {name}", lambda name=name: manager.load([name]))
            for kind, members in self._loaded.items():
                members |= found.get(kind, {})
        for task in self._loaded["tasks"].values():
            self._set_up(task, fewshot)

    def _set_up(self, task: Any, fewshot: int | None) -> None:
        """Choose the number of examples as the harness does: a task that states 0 keeps it."""
        stated = task.get_config("num_fewshot")
        if fewshot is None:
            task.set_config(key="num_fewshot", value=stated or 0)
        elif stated != 0:
            task.set_config(key="num_fewshot", value=fewshot)

    @property
    def without_examples(self) -> list[str]:
        """Names of the tasks that are always asked without examples."""
        tasks = self._loaded["tasks"].items()
        return [name for name, task in tasks if task.get_config("num_fewshot") == 0]

    @property
    def generating(self) -> list[str]:
        """Names of the tasks that ask for texts to be generated."""
        tasks = self._loaded["tasks"].items()
        return [name for name, task in tasks if task.OUTPUT_TYPE == "generate_until"]

    def run(self, model: LM, limit: int, *, resamples: int = 100_000) -> dict[str, Any]:
        """Return the harness's results; the requests are the same whenever it is called.

        Args:
            model: model that answers the requests.
            limit: number of documents of each task; 0 means all.
            resamples: number of samples behind standard errors that have no formula; 0 computes no
                standard errors.

        Raises:
            DataFault: a task asks for what the model cannot do, or its metrics fail.
        """
        # The seeds of the harness's own program.
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        found = _guarded(
            f"task {', '.join(self.names)}",
            lambda: evaluate(
                model,
                self._loaded,
                limit=limit or None,
                log_samples=False,
                bootstrap_iters=resamples,
            ),
        )
        assert found is not None, "there is one process"
        return dict(found)


def tables(results: dict[str, Any]) -> Iterator[str]:
    """Yield the harness's tables of its results: of tasks, and of groups if there are any."""
    yield make_table(results)
    if results.get("groups"):
        yield make_table(results, "groups")


def _manager(names: Sequence[str], include: Sequence[Path]) -> TaskManager:
    """Return the tasks that are known; the thousands of the harness's own only if they are asked
    for, because reading their files takes seconds."""
    for folder in include:
        if not folder.is_dir():
            raise UsageError(f"--include-path {folder}: is no folder, expected one of task files")
    folders: list[str | Path] = [*include]
    if include:
        where = f"--include-path {', '.join(map(str, include))}"
        own = _guarded(where, lambda: TaskManager(include_path=folders, include_defaults=False))
        if all(name in own.all_subtasks for name in names):
            return own
    return _guarded("the task files", lambda: TaskManager(include_path=folders or None))


def _found(names: Sequence[str], manager: TaskManager, include: Sequence[Path]) -> list[str]:
    """Return the names with patterns resolved, each once."""
    found: list[str] = []
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            raise UsageError(
                f"the harness has no task {name!r}, expected one of its "
                f"{len(manager.all_tasks):,} tasks, groups and tags",
                hint="; ".join(_hints(name, manager, include))
                or "name a folder of task files with --include-path DIR",
            )
        found += matching
    return list(dict.fromkeys(found))


def _hints(name: str, manager: TaskManager, include: Sequence[Path]) -> Iterator[str]:
    """Yield names like one that does not exist, and files that the harness skips without a word."""
    if near := difflib.get_close_matches(name, manager.all_tasks, n=3):
        yield f"names like it: {', '.join(near)}"
    read = {str(entry.yaml_path) for entry in manager.task_index.values()}
    files = sorted(path for folder in include for path in folder.rglob("*.yaml"))
    if skipped := [str(path) for path in files if not {str(path), str(path.resolve())} & read]:
        yield f"no task is defined in {', '.join(skipped[:3])}"


def _guarded(where: str, work: Callable[[], T]) -> T:
    """Return the result of work that runs the code of tasks, whose errors have any class.

    Raises:
        GptjError: for every error.
    """
    try:
        with _quiet():
            return work()
    except (GptjError, MemoryError, BrokenPipeError):
        raise
    except Exception as e:
        text = " ".join(str(e).split())[:400]
        shown = f"{where}: {type(e).__name__}: {text}"
        if any(_is_of_network(cause) for cause in _causes(e)):
            raise HubFault(
                f"{where}: its data set is not cached and cannot be fetched: {text}", hint=_OFFLINE
            ) from e
        raise DataFault(
            shown, hint="run it again with GPTJ_DEBUG=1 for the harness's own words"
        ) from e


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_network(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        names & {"ConnectionError", "ConnectError", "LocalEntryNotFoundError", "TimeoutException"}
    )


@contextmanager
def _quiet() -> Generator[None]:
    """Leave stdout and stderr to this program while the harness runs: it prints, logs and draws
    bars, and so does what it loads data with."""
    import datasets

    names = ("lm_eval", "datasets", "huggingface_hub", "httpx")
    levels = {name: logging.getLogger(name).level for name in names}
    bar, shown = tqdm.__init__, datasets.is_progress_bar_enabled()
    # The harness would fork this process, with the threads of its framework, for standard errors.
    alone = os.environ.get("DISABLE_MULTIPROC")
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        tqdm.__init__ = partialmethod(bar, disable=True)  # pyright: ignore[reportAttributeAccessIssue]
        os.environ["DISABLE_MULTIPROC"] = "1"
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if shown:
            datasets.enable_progress_bars()
        tqdm.__init__ = bar
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
