"""What a conversion and a verification may be asked for.

The standard library only, so that the command line can offer it without loading the rest.
"""

from __future__ import annotations

from pathlib import Path

#: "keep" leaves every tensor in the dtype it has.
KEEP = "keep"
DTYPES = ("float32", "float16", "bfloat16")

#: Formats that can be written, by `gptj_model.tensors.Scheme` value, with their dtype and folder
#: when none is asked for. The reference's variables are float32.
DEFAULT_DTYPE = {"tf": "float32", "hf": KEEP}
DEFAULT_OUT = {"tf": Path("converted"), "hf": Path("converted-hf")}

#: Where `gptj download` puts the public model, and so what `gptj convert` takes.
DEFAULT_SOURCE = Path("gpt-j-6b")

#: Levels of verification, from cheap to dear.
LEVELS = ("structure", "weights", "logits")
