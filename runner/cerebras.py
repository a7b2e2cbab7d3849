"""A run on a CS system: the command line of its client, checked before it starts and followed to
its end.

`runner.config.cs_target` describes the two generations of clients.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_convert.checkpoint.open import locate, read_config
from gptj_convert.conversion.source_card import carried_document
from gptj_convert.files.whole_file import write_whole
from gptj_convert.formats.layouts import cs, hf, tf
from gptj_convert.settings.params_yaml import (
    PARAMS_FILE,
    config_from_model_section,
    read_yaml,
    yaml_text,
)
from gptj_convert.settings.trainer_yaml import TRAINER_FILE, trainer_from_params
from gptj_model.config import CONFIG_FILE, GPTJConfig
from gptj_model.errors import ConfigError, FileFault, GptjError, UsageError
from runner.config.cs_target import Target
from runner.config.params_file import load_params

#: Port of a system's address when none is given.
PORT = 9000
#: File with the client's whole output, in the run's folder.
LOG_FILE = "client.log"
#: Number of its lines that an error quotes.
_LAST_LINES = 5
#: Meaning of messages of the client, and what to do.
_KNOWN_FAILURES = (
    (
        r"busy|in use by|no resources|insufficient resources|queue",
        "the system is taken: run it again when the other job is done",
    ),
    (
        r"connection (?:refused|reset|lost|timed out)|unavailable|failed to connect|no route",
        "the system was not reached: check its address (--cs-ip) and the network; the same "
        "command resumes from the last checkpoint",
    ),
    (
        r"compil\w+ (?:failed|error)|failed to compile|could not (?:be )?compile",
        "the client could not compile the model: see its log for the operation; a smaller batch "
        "or sequence may fit",
    ),
    (r"out of memory|oom|cannot allocate", "a smaller batch or sequence may fit"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CsJob:
    """A run on a CS system, as a command line asks for it."""

    target: Target
    cs_ip: str | None
    """Address of the system; None lets the client find it, or run on its CPU backend."""
    model_dir: Path
    mode: str
    init_from: Path | None
    """Checkpoint to start from; None starts from random weights, or resumes."""
    params_file: Path | None = None
    """trainer.yaml for csx, the reference's YAML for legacy; None looks beside the checkpoint."""
    max_steps: int | None = None
    eval_steps: int | None = None
    run_py: Path | None = None
    """The reference's program, for legacy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A client ready to be started."""

    command: tuple[str, ...]
    writes: Mapping[Path, str | bytes]
    """Files to write first, with their content."""
    problems: tuple[GptjError, ...] = ()
    """What is still missing; only a dry run accepts problems."""

    @property
    def shell(self) -> str:
        """Command as a shell reads it."""
        return shlex.join(self.command)


def prepare(job: CsJob) -> Launch:
    """Return the client to start, and what is still missing.

    Raises:
        UsageError: the client has no such mode, or something is not named.
        ConfigError: the configuration cannot be read, or has no counterpart there.
        FileFault: the checkpoint does not exist.
    """
    if job.mode not in ("train", "eval"):
        raise UsageError(
            f"a CS system takes the modes train and eval, found {job.mode}",
            hint="run them one after the other",
        )
    if job.mode == "eval" and not job.eval_steps:
        raise UsageError(
            "mode eval on a CS system needs a number of batches", hint="add --eval-steps N"
        )
    return _csx(job) if job.target is Target.CSX else _legacy(job)


def _csx(job: CsJob) -> Launch:
    named = None if job.init_from is None else _weights(job.init_from)
    # The client looks for its last checkpoint only when it is given none.
    last = cs.newest(job.model_dir)
    checkpoint = (last or named) if job.mode == "train" else (named or last)
    if checkpoint is None and (job.mode == "eval" or job.params_file is None):
        raise UsageError(
            f"{job.model_dir}: holds no checkpoint to resume from",
            hint="name one: `--init-from DIR`, in run.py `--checkpoint_path PATH`; or train from "
            "random weights: `--params FILE`",
        )
    path = job.params_file or _beside(named or last, TRAINER_FILE)
    values = read_yaml(path)
    if "trainer" not in values:
        load_params(path)  # for its errors
        config = _config(values, path) if checkpoint is None else _config_of(checkpoint)
        values = trainer_from_params(config, values, checkpoint=None, data=_data_folders(values))
    section = values["trainer"]
    init, fit, validate = (section.get(key) or {} for key in ("init", "fit", "validate"))
    init["model_dir"] = str(job.model_dir)
    if job.cs_ip:
        backend = init.setdefault("backend", {})
        backend["backend_type"] = "CSX"
        backend.setdefault("cluster_config", {})["mgmt_address"] = with_port(job.cs_ip)
    if job.max_steps is not None:
        init.setdefault("loop", {})["max_steps"] = job.max_steps
    if job.eval_steps:
        init.setdefault("loop", {})["eval_steps"] = job.eval_steps
    for part in (fit, validate):
        part.pop("ckpt_path", None)
        if checkpoint:
            part["ckpt_path"] = str(checkpoint.absolute())
    loader = fit.get("train_dataloader") if job.mode == "train" else validate.get("val_dataloader")
    folders = loader.get("data_dir", []) if isinstance(loader, dict) else []
    folders = folders if isinstance(folders, list) else [folders]
    effective = job.model_dir / TRAINER_FILE
    return Launch(
        command=("cszoo", "fit" if job.mode == "train" else "validate", str(effective)),
        writes={
            effective: yaml_text(values | {"trainer": _trainer(init, fit, validate)}),
            **_settings(job, named),
        },
        problems=(*_no_program("cszoo"), *_no_records(folders, "*.h5", "hdf5")),
    )


def _settings(job: CsJob, checkpoint: Path | None) -> dict[Path, bytes]:
    """Return the files beside the checkpoint that training starts from, for the run's folder, where
    conversions of the run's own checkpoints find them."""
    if checkpoint is None or job.mode != "train" or checkpoint.parent == job.model_dir:
        return {}
    names = hf.settings_files(checkpoint.parent)
    names = [*(n for n in names if n == CONFIG_FILE), *hf.choose_companions(names)]
    beside = (p.name for p in checkpoint.parent.iterdir() if p.is_file())
    documents = [n for n in hf.choose_documents(beside) if not (job.model_dir / n).exists()]
    settings = {job.model_dir / name: (checkpoint.parent / name).read_bytes() for name in names}
    return settings | {
        job.model_dir / n: carried_document(checkpoint.parent / n) for n in documents
    }


def _weights(path: Path) -> Path:
    found = cs.find_weights(path)
    if found is None:
        raise FileFault(
            f"{path}: holds no {cs.MODEL_FILE}, which the client starts from",
            hint=f"make it: `gptj convert {path} --to cs`, and --init-from what it makes",
        )
    return found


def _trainer(init: Any, fit: Any, validate: Any) -> dict[str, Any]:
    return {"init": init, "fit": fit, "validate": validate}


def _legacy(job: CsJob) -> Launch:
    if job.run_py is None:
        raise UsageError(
            "the legacy client runs the reference's own program",
            hint="name it: `--run-py PATH/run.py`",
        )
    if job.cs_ip is None:
        raise UsageError("the legacy client needs the system's address", hint="add --cs-ip IP")
    if not job.run_py.is_file():
        raise FileFault(f"{job.run_py}: not found, expected the reference's run.py")
    prefix = None if job.init_from is None else _bundle(job.init_from)
    params_file = job.params_file or _beside(prefix, PARAMS_FILE)
    values = read_yaml(params_file)
    steps = job.max_steps or (values.get("runconfig") or {}).get("max_steps")
    command = ["csrun_wse", "python-ws", str(job.run_py)]
    command += ["--model_dir", str(job.model_dir), "--params", str(params_file)]
    command += ["--mode", job.mode]
    if job.mode == "eval":
        command += ["--eval_steps", str(job.eval_steps)]
    elif steps:
        command += ["--max_steps", str(steps)]
    command += ["--cs_ip", with_port(job.cs_ip)]
    if prefix:
        command += ["--checkpoint_path", str(prefix)]
    records = "train_input" if job.mode == "train" else "eval_input"
    return Launch(
        command=tuple(command),
        writes=_settings(job, prefix),
        problems=(
            *_no_program("csrun_wse"),
            *_no_records(_data_folders(values, records), "*.tfrecord*", "tfrecord"),
        ),
    )


def with_port(address: str) -> str:
    """Return an address with its port."""
    return address if re.search(r":\d+$", address) else f"{address}:{PORT}"


def _beside(checkpoint: Path | None, name: str) -> Path:
    if checkpoint is None:
        raise UsageError(
            f"no checkpoint is named, beside which {name} may be",
            hint="name one with --init-from, or the parameters with --params",
        )
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(
        f"{checkpoint.parent}: holds no {name}", hint="name the configuration with --params FILE"
    )


def _bundle(path: Path) -> Path:
    found = tf.find_bundle(path)
    if found is None:
        raise FileFault(
            f"{path}: holds no TensorFlow checkpoint, which the reference starts from",
            hint=f"make it: `gptj convert {path} --to tf`",
        )
    return found


def _config_of(checkpoint: Path) -> GPTJConfig:
    return read_config(locate(checkpoint), None)


def _config(values: Mapping[str, Any], path: Path) -> GPTJConfig:
    vocab_size = values["train_input"].get("vocab_size")
    return config_from_model_section(values["model"], vocab_size=vocab_size, where=str(path))


def _data_folders(values: Mapping[str, Any], section: str = "train_input") -> list[str]:
    found = (values.get(section) or {}).get("data_dir", [])
    return found if isinstance(found, list) else [found]


def _no_program(name: str) -> Iterator[GptjError]:
    if shutil.which(name) is None:
        yield FileFault(
            f"the program {name} is not on PATH",
            hint="run this where the client is installed, with its environment active",
        )


def _no_records(folders: list[str], pattern: str, form: str) -> Iterator[GptjError]:
    for folder in folders or [""]:
        if not folder or not any(Path(folder).glob(pattern)):
            yield FileFault(
                f"{folder or 'data_dir'}: holds no file that matches {pattern}",
                hint=f"make records: `gptj data text SRC --format {form} --out {folder or 'data'}`",
            )


def follow(launch: Launch, model_dir: Path, tell: Callable[[str], None]) -> int:
    """Start the client and wait for its end; signals are forwarded to it.

    Args:
        launch: client without problems.
        model_dir: folder of the run, which keeps the log.
        tell: is called with every line of the output.

    Returns:
        Exit code of the client; for a signal, 128 plus its number.
    """
    for path, text in launch.writes.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    model_dir.mkdir(parents=True, exist_ok=True)
    with (
        (model_dir / LOG_FILE).open("a", encoding="utf-8") as log,
        subprocess.Popen(
            launch.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
        _handed_on(process),
    ):
        assert process.stdout
        for line in process.stdout:
            log.write(line)
            log.flush()
            tell(line.rstrip("\n"))
    code = process.returncode
    return 128 - code if code < 0 else code


@contextmanager
def _handed_on(process: subprocess.Popen[str]) -> Iterator[None]:
    """Forward SIGINT and SIGTERM to the client's whole group instead of ending this program."""

    def hand_on(number: int, frame: object) -> None:
        if process.poll() is None:
            os.killpg(process.pid, number)

    before = {n: signal.signal(n, hand_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def failure(code: int, model_dir: Path) -> FileFault:
    """Return the fault behind a client's exit code, from the end of its log."""
    log = model_dir / LOG_FILE
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]
    last = "\n  ".join(line[:300] for line in lines[-_LAST_LINES:])
    text = "\n".join(lines[-50:])
    known = (hint for pattern, hint in _KNOWN_FAILURES if re.search(pattern, text, re.IGNORECASE))
    return FileFault(
        f"the client ended with exit code {code}; its last lines:\n  {last}",
        hint=next(known, f"its whole log is {log}"),
    )
