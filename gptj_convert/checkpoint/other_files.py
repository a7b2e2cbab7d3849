"""What a path holds where it holds no checkpoint of GPT-J, in words, and the command to run next.

Every row of `ROWS` is a kind of folder that people have; the first that applies is reported.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptj_convert.checkpoint.adapter_folder import CONFIG_FILE as ADAPTER_CONFIG
from gptj_convert.checkpoint.adapter_folder import is_adapter, stated_base
from gptj_convert.formats.containers import sharded
from gptj_convert.formats.layouts import cs, hf, keras, tf
from gptj_model.config import CONFIG_FILE
from gptj_model.errors import FileFault

#: Files that transformers' Trainer and peft put beside weights under similar names.
_BESIDE = r"(optimizer|scheduler|scaler|rng_state|training_args|adapter_model)\b.*|rng_state_\d+.*"
#: Largest number of subfolders that are examined.
_MOST_FOLDERS = 200
_OLD_TRANSFORMERS = (
    'in an environment with transformers 4: python -c "from transformers import '
    "AutoModelForCausalLM as M; M.from_pretrained({path!r}, {option}=True)"
    '.save_pretrained({new!r})"'
)


@dataclass(frozen=True, slots=True)
class Found:
    """What a path holds, and what to do with it."""

    what: str
    """Completes "holds …"."""
    hint: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of folder."""

    kind: str
    look: Callable[[Path], Found | None]
    """Returns None where the folder is of another kind."""


def no_checkpoint(path: Path) -> FileFault:
    """Return the fault of a path that is no checkpoint of GPT-J: what it is, and what to do."""
    if not path.exists():
        return FileFault(
            f"{path}: not found, expected a checkpoint",
            hint="download GPT-J-6B to ./gpt-j-6b with `gptj download`, or make a random "
            "model with `gptj new`",
        )
    if not path.is_dir():
        found = next((f for row in FILES if (f := row.look(path))), None)
        what = f"is {found.what}" if found else "is not a checkpoint"
        return FileFault(
            f"{path}: {what}, expected .safetensors, .bin, .pt, .index, .h5 or .mdl",
            hint=found.hint if found else None,
        )
    for row in ROWS:
        if found := row.look(path):
            return FileFault(f"{path}: holds {found.what}, expected a checkpoint", hint=found.hint)
    wanted = ", ".join(
        (*hf.WEIGHT_FILES, f"{tf.CONVERTED_PREFIX}.index", keras.WEIGHTS_FILE, cs.MODEL_FILE)
    )
    return FileFault(f"{path}: holds no checkpoint, expected one of {wanted}")


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def _files(folder: Path, pattern: str) -> list[str]:
    """Return the names of files that match a regular expression as a whole."""
    return [n for n in _names(folder) if re.fullmatch(pattern, n) and (folder / n).is_file()]


def _folders(folder: Path) -> Iterator[Path]:
    paths = (p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith("."))
    for _, path in zip(range(_MOST_FOLDERS), paths, strict=False):
        yield path


def _has_weights(folder: Path) -> bool:
    """Return whether a checkpoint is in this very folder, judging by file names."""
    names = (*hf.WEIGHT_FILES, f"{tf.CONVERTED_PREFIX}.index", keras.WEIGHTS_FILE, cs.MODEL_FILE)
    return any((folder / n).is_file() for n in (*names, tf.STATE_FILE))


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _use(path: Path) -> str:
    return f"name it instead: {_quoted(path)}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _shards(folder: Path) -> Found | None:
    if not (shards := [n for n in _names(folder) if sharded.shards_of(n)]):
        return None
    index = " or ".join(n for n in hf.WEIGHT_FILES if sharded.is_index(n))
    return Found(
        f"shards ({_listed(shards)}) without their index, {index}",
        "fetch the index from where the shards came from",
    )


def _trainer(folder: Path) -> Found | None:
    steps = {
        int(m[1]): p
        for p in _folders(folder)
        if (m := re.fullmatch(r"checkpoint-(\d{1,12})", p.name)) and _has_weights(p)
    }
    if not steps:
        return None
    last = steps[max(steps)]
    return Found(f"checkpoints of transformers' Trainer, the last {last.name}", _use(last))


def _cache(folder: Path) -> Found | None:
    """Recognize a folder `models--OWNER--NAME` of the hub's cache, or the cache itself."""
    roots = [folder] if (folder / "snapshots").is_dir() else []
    roots += [p for p in _folders(folder) if re.match("models--", p.name)]
    for root in roots:
        snapshots = root / "snapshots"
        if not snapshots.is_dir():
            continue
        main = root / "refs" / "main"
        commit = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
        found = [p for p in _folders(snapshots) if _has_weights(p)]
        if found:
            chosen = next((p for p in found if p.name == commit), found[0])
            return Found("the hub's cache, with the model in snapshots/", _use(chosen))
    return None


def _adapter(folder: Path) -> Found | None:
    if not is_adapter(folder):
        return None
    base = shlex.quote(stated_base(folder) or "BASE")
    return Found(
        f"an adapter ({ADAPTER_CONFIG}) and no model",
        f"merge it into its base: `gptj convert {base} --adapter {_quoted(folder)} --to hf`",
    )


def _other_framework(kind: str, file: str, option: str) -> Row:
    def look(folder: Path) -> Found | None:
        pattern = file.replace(".", r"\.") + r"(\.index\.json)?"
        if not (names := _files(folder, pattern)):
            return None
        path, new = str(folder), f"{folder.resolve().name}-pytorch"
        return Found(
            f"weights of transformers' {kind} ({names[0]})",
            _OLD_TRANSFORMERS.format(path=path, option=option, new=new),
        )

    return Row(f"transformers' {kind}", look)


def _deepspeed(folder: Path) -> Found | None:
    names = [n for n in _names(folder) if re.match(r"(bf16_)?zero_pp_rank_|mp_rank_\d", n)]
    inner = [p.name for p in _folders(folder) if re.fullmatch(r"global_step\d+", p.name)]
    if not names and not inner:
        return None
    root = folder if inner else folder.parent
    return Found(
        f"a checkpoint of DeepSpeed, divided among its ranks ({(names or inner)[0]})",
        f"join it: `python zero_to_fp32.py {_quoted(root)} {_quoted(root / hf.TORCH_FILE)}`",
    )


def _distributed(folder: Path) -> Found | None:
    if not (names := _files(folder, r"__\d+_\d+\.distcp")):
        return None
    return Found(
        f"a distributed checkpoint of PyTorch ({_listed(names)})",
        "join it: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        f"{_quoted(folder)} {_quoted(folder.with_name('joined.pt'))}`",
    )


def _other_runtime(folder: Path) -> Found | None:
    for pattern, what in (
        (r".+\.gguf|ggml-.+\.bin", "weights of llama.cpp"),
        (r".+\.onnx", "an ONNX model"),
        (r"saved_model\.pb", "a TensorFlow SavedModel"),
        (r"rust_model\.ot", "weights of rust-bert"),
        (r"step_\d+.*\.tar(\.zst)?", "weights of the original GPT-J trainer"),
    ):
        if names := _files(folder, pattern):
            return Found(
                f"{what} ({_listed(names)})",
                "use the Hugging Face checkpoint that it was made from",
            )
    return None


def _other_name(folder: Path) -> Found | None:
    """Recognize readable weights under an unusual name."""
    names = [
        n
        for n in _names(folder)
        if (folder / n).suffix in hf.WEIGHT_SUFFIXES
        and not re.fullmatch(_BESIDE, n)
        and sharded.kind_of_content(folder / n)
    ]
    if not names:
        return None
    return Found(
        f"{', '.join(names[:3])}{' and more' if names[3:] else ''}", _use(folder / names[0])
    )


def _inner(folder: Path) -> Found | None:
    found = [p for p in _folders(folder) if _has_weights(p)]
    return Found(f"a checkpoint in its folder {found[0].name}", _use(found[0])) if found else None


def _no_weights(folder: Path) -> Found | None:
    names = _names(folder)
    if not names:
        return Found("nothing", "name the folder that the weights are in")
    if CONFIG_FILE not in names:
        return None
    return Found(
        f"{CONFIG_FILE} and no weights",
        "copy or download the weights to that folder too",
    )


#: Kinds of folders, the most specific first.
ROWS: tuple[Row, ...] = (
    Row("shards without an index", _shards),
    Row("folders of transformers' Trainer", _trainer),
    Row("the hub's cache", _cache),
    Row("an adapter of peft", _adapter),
    Row("DeepSpeed", _deepspeed),
    Row("PyTorch's distributed checkpoint", _distributed),
    Row("weights by another name", _other_name),
    _other_framework("TensorFlow", "tf_model.h5", "from_tf"),
    _other_framework("Flax", "flax_model.msgpack", "from_flax"),
    Row("another runtime", _other_runtime),
    Row("a folder further in", _inner),
    Row("no weights", _no_weights),
)


def _a_config(path: Path) -> Found | None:
    if path.suffix != ".json":
        return None
    return Found("a JSON file", f"name the folder that holds the weights: `{_quoted(path.parent)}`")


def _flax_file(path: Path) -> Found | None:
    if path.suffix != ".msgpack":
        return None
    return Found("a file of Flax", f"name its folder for instructions: `{_quoted(path.parent)}`")


#: Kinds of single files.
FILES: tuple[Row, ...] = (Row("a JSON file", _a_config), Row("Flax", _flax_file))
