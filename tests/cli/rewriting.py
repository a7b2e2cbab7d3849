"""A bundle changed as a faulty converter would: whole, with right checksums, and no manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gptj_convert.formats.containers.tensor_bundle import BundleSource, write_bundle
from gptj_model.source import read_tensor


def rewrite_bundle(
    folder: Path, change: Callable[[dict[str, np.ndarray]], None], *, name: str = "tf_model.ckpt"
) -> None:
    """Change the tensors of a bundle in `folder`, by TF name."""
    prefix = folder / name
    source = BundleSource(prefix)
    tensors = {name: read_tensor(source, name).copy() for name in source.tensors}
    source.close()
    change(tensors)
    for path in folder.glob(f"{prefix.name}.*"):
        path.unlink()
    write_bundle(prefix, tensors)
    (folder / "manifest.json").unlink(missing_ok=True)
