"""Copy a converted folder and leave one of its square tensors untransposed, as a faulty converter
would: with right checksums, so that only a comparison with the source can tell.

Usage: damage.py CONVERTED COPY TENSOR
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from gptj_convert.conversion.manifest import MANIFEST_FILE
from gptj_convert.formats.containers.tensor_bundle import BundleSource, write_bundle
from gptj_convert.formats.layouts.tf import CONVERTED_PREFIX
from gptj_model.source import read_tensor

if __name__ == "__main__":
    converted, copy, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    source = BundleSource(converted / CONVERTED_PREFIX)
    tensors = {n: read_tensor(source, n) for n in source.tensors}
    tensors[name] = tensors[name].T
    bundle_files = {p.name for p in source.files}
    shutil.copytree(
        converted, copy, ignore=lambda _, names: bundle_files & set(names) | {MANIFEST_FILE}
    )
    write_bundle(copy / CONVERTED_PREFIX, tensors)
