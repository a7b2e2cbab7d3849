"""A recording of a model's outputs, for machines that cannot run the original.

A recording is a folder with `recording.json`, which describes the model and the prompts, and
`outputs.npz`, float32. Of long prompts some tokens are kept, evenly spread; of short prompts also
the hidden states.

Shape suffixes: N kept tokens, D hidden, V vocabulary, L blocks.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from golden.prompts import Prompt
from gptj_model.config import GPTJConfig
from gptj_model.errors import FileFault

RECORDING_FILE = "recording.json"
OUTPUTS_FILE = "outputs.npz"
FORMAT_VERSION = 1

#: Number of tokens of a prompt whose logits are kept.
KEPT = 16
#: Recording of a small random model that comes with the program.
TINY = "tiny"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedPrompt:
    """One prompt and the model's outputs for it."""

    prompt: Prompt
    kept: np.ndarray
    """Indices of the tokens whose logits are kept: (N,)."""
    logits: np.ndarray
    """Logits of the kept tokens, float32 (N, V)."""
    hidden: np.ndarray | None
    """Hidden states after each block, float32 (L, T, D); None where they are not recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Everything that is recorded of one model."""

    config: GPTJConfig
    dtype: str
    """Dtype that the weights were rounded to before the model ran in float32."""
    made_by: str
    """Description of the model."""
    versions: Mapping[str, str]
    """Versions of the libraries that ran the original."""
    weights: Mapping[str, Mapping[str, str]]
    """crc32c in hex of each tensor's values in HF's layout, by HF name and by the dtype they are
    rounded to."""
    prompts: tuple[RecordedPrompt, ...]


def kept_tokens(prompt: Prompt) -> np.ndarray:
    """Return the indices of a prompt's recorded tokens, the first and the last among them."""
    return np.unique(np.linspace(0, prompt.tokens - 1, KEPT).round().astype(np.int64))


def write_recording(recording: Recording, folder: Path) -> None:
    """Write a recording to an empty folder.

    Raises:
        OSError: the folder cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    rows = []
    for n, recorded in enumerate(recording.prompts):
        prompt = recorded.prompt
        arrays[f"logits_{n}"] = recorded.logits
        if recorded.hidden is not None:
            arrays[f"hidden_{n}"] = recorded.hidden
        rows.append(
            {
                "name": prompt.name,
                "ids": prompt.ids[0].tolist(),
                "start": int(prompt.positions[0, 0]),
                "kept": recorded.kept.tolist(),
            }
        )
    np.savez(folder / OUTPUTS_FILE, allow_pickle=False, **arrays)
    fields = {
        "format_version": FORMAT_VERSION,
        "config": recording.config.to_hf(dtype=recording.dtype),
        "dtype": recording.dtype,
        "made_by": recording.made_by,
        "versions": dict(recording.versions),
        "weights": {name: dict(crcs) for name, crcs in recording.weights.items()},
        "prompts": rows,
    }
    (folder / RECORDING_FILE).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def read_recording(folder: Path | None) -> Recording:
    """Read a recording; None reads the one that comes with the program.

    Raises:
        FileFault: the folder does not exist or is not a recording.
        ConfigError: its model is not a GPT-J.
    """
    path = folder if folder is not None else Path(str(files("golden") / TINY))
    try:
        fields = json.loads((path / RECORDING_FILE).read_text(encoding="utf-8"))
        config = GPTJConfig.from_hf(fields["config"])
        # Opened here, because numpy leaves a damaged file open.
        with (path / OUTPUTS_FILE).open("rb") as f, np.load(f, allow_pickle=False) as arrays:
            prompts = tuple(
                _recorded(row, n, arrays, config) for n, row in enumerate(fields["prompts"])
            )
        return Recording(
            config=config,
            dtype=fields["dtype"],
            made_by=str(fields["made_by"]),
            versions=dict(fields["versions"]),
            weights={name: dict(crcs) for name, crcs in fields["weights"].items()},
            prompts=prompts,
        )
    except FileNotFoundError as e:
        raise FileFault(
            f"{e.filename}: not found, expected a recording",
            hint="make one with `gptj golden record MODEL --out DIR`, where PyTorch is installed",
        ) from None
    except _NOT_A_RECORDING as e:
        raise FileFault(f"{path}: is not a recording of this program: {e}") from None


_NOT_A_RECORDING = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    RecursionError,
    zipfile.BadZipFile,
)


def _recorded(
    row: Mapping[str, Any], n: int, arrays: Mapping[str, np.ndarray], config: GPTJConfig
) -> RecordedPrompt:
    ids_T = np.asarray(row["ids"], np.int32)
    start, kept = int(row["start"]), np.asarray(row["kept"], np.int64)
    logits = np.asarray(arrays[f"logits_{n}"], np.float32)
    hidden = np.asarray(arrays[f"hidden_{n}"]) if f"hidden_{n}" in arrays else None
    T = len(ids_T)
    inside = 0 <= start <= config.n_positions - T and ids_T.min() >= 0
    if not inside or ids_T.max() >= config.vocab_size or kept.max() >= T or kept.min() < 0:
        raise ValueError(f"prompt {row['name']!r} does not fit this model")
    if logits.shape != (len(kept), config.vocab_size):
        raise ValueError(f"prompt {row['name']!r}: logits have shape {logits.shape}")
    if hidden is not None and hidden.shape != (config.n_layer, T, config.n_embd):
        raise ValueError(f"prompt {row['name']!r}: hidden states have shape {hidden.shape}")
    positions = np.arange(start, start + T, dtype=np.int32)[None]
    prompt = Prompt(str(row["name"]), ids_T[None], positions, np.ones((1, T), bool))
    return RecordedPrompt(prompt=prompt, kept=kept, logits=logits, hidden=hidden)
