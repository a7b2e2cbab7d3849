"""The choices that conversions and verifications offer.

The standard library only, so that the command line can offer it without loading the rest.
"""

from __future__ import annotations

import re
from pathlib import Path

#: Choice of dtype that leaves every tensor as it is.
KEEP = "keep"
DTYPES = ("float32", "float16", "bfloat16")

#: Default dtype and output folder of each format that can be written, by
#: `gptj_model.tensors.Scheme` value. The reference's variables are float32.
DEFAULT_DTYPE = {"tf": "float32", "hf": KEEP, "keras": KEEP, "cs": KEEP}
DEFAULT_OUT = {
    "tf": Path("converted"),
    "hf": Path("converted-hf"),
    "keras": Path("converted-keras"),
    "cs": Path("converted-cs"),
}

#: File formats of `gptj new`, by the name of a single weight file; and the memory order of linear
#: layers in a `.bin`: as PyTorch makes them, or as transposed views, which is how the public
#: GPT-J-6B stores them.
FILE_FORMATS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
ROW_MAJOR, TRANSPOSED = LAYOUTS = ("row-major", "transposed")

#: Format of `gptj convert` for the adapter of a run with LoRA, instead of a whole model.
PEFT = "peft"
PEFT_OUT = Path("converted-peft")

#: How PyTorch's optimizer numbers the parameters: `gptj_model.optimizer_names.Grouping`.
GROUPINGS = ("one", "decay")

#: Backends of the CS client, its systems first.
CS_BACKENDS = ("CSX", "CPU")

#: Which vocabulary size counts if config.json and the tensors disagree.
FROM_TENSORS = "from-tensors"
FROM_CONFIG = "from-config"
VOCAB_SIZES = (FROM_TENSORS, FROM_CONFIG)

#: Units of sizes, as transformers takes them.
_UNITS = {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for ending, base in (("B", 1000), ("iB", 1024))
}

#: File beside records that says what they were made from, and how.
DATA_PARAMS_FILE = "data_params.json"

#: Folder that `gptj download` puts the public model into, and that `gptj convert` reads by default.
DEFAULT_SOURCE = Path("gpt-j-6b")

#: Levels of verification from cheap to expensive, the default last level, and the word for all.
LEVELS = ("structure", "weights", "logits", "gradients", "generation", "tasks")
DEFAULT_LEVEL = "logits"
#: Level that takes requests from outside.
TASKS_LEVEL = "tasks"
ALL_LEVELS = "all"
#: Levels that run the models, and therefore need TensorFlow, torch and transformers.
MODEL_LEVELS = LEVELS[LEVELS.index("logits") :]
#: Levels that a recording of the original can stand in for.
RECORDED_LEVELS = LEVELS[: LEVELS.index("logits") + 1]


def levels_up_to(level: str) -> tuple[str, ...]:
    """Return the levels that run when `level` is the last one asked for."""
    return LEVELS if level == ALL_LEVELS else LEVELS[: LEVELS.index(level) + 1]


def parse_bytes(text: str) -> int:
    """Return the number of bytes in a size such as 2GB, 500MiB, 1.5GB or 1000.

    Raises:
        ValueError: the text is not a size, or is less than a byte.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    units = {"": 1} | {unit.upper(): factor for unit, factor in _UNITS.items()}
    if not found or found[2].upper() not in units:
        raise ValueError(
            f"{text!r} is not a size, expected a number, and one of {', '.join(_UNITS)} or nothing"
        )
    size = int(float(found[1]) * units[found[2].upper()])
    if size < 1:
        raise ValueError(f"{text!r} is less than a byte")
    return size
