"""Level structure: files, config and headers of a converted checkpoint against those of its
source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gptj_convert.checkpoint import vocabulary_size
from gptj_convert.checkpoint.match import survey
from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.manifest import MANIFEST_FILE, Manifest
from gptj_convert.conversion.plan import head_is_embedding, match
from gptj_convert.inspection.integrity import StatedFile
from gptj_convert.verification.evidence.diagnosis import of_file, of_vocabulary
from gptj_convert.verification.evidence.verdict import Difference, names
from gptj_model.config import CONFIG_FILE, NOT_COMPUTED, GPTJConfig, differing_fields
from gptj_model.errors import FileFault, GptjError, TensorFault

#: Largest size of files that are hashed at this level; larger ones are hashed at level weights.
SMALL_FILE = 2**20


def check_files(folder: Path) -> tuple[Manifest | None, list[Difference]]:
    """Return the manifest, and the files that differ from it; of large files only the size is
    compared."""
    try:
        manifest = Manifest.read(folder)
    except FileFault as e:
        return None, [Difference("structure", e.message, "a manifest", file=MANIFEST_FILE)]
    found = []
    for name, stated in (manifest.files if manifest else {}).items():
        file = StatedFile(folder / name, stated["bytes"], stated["sha256"])
        size = _size(file.path)
        if stated["bytes"] <= SMALL_FILE or size != stated["bytes"]:
            for _ in file:
                pass
            if file.fault:
                found.append(file_difference("structure", file))
    return manifest, found


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def file_difference(level: str, file: StatedFile) -> Difference:
    """Return the difference of a file that is not what the manifest says."""
    found, expected = file.fault or ("", "")
    diagnosis = of_file(_size(file.path), file.size or 0)
    return Difference(level, found, expected, file=file.path.name, diagnosis=diagnosis)


def unopened(fault: GptjError, of_files: Sequence[Difference]) -> Difference:
    """Return the difference of a checkpoint that cannot be opened, with the file that may be the
    cause."""
    found = "; ".join(fault.problems) if isinstance(fault, TensorFault) else fault.message
    named = [d for d in of_files if d.file and d.file in found] or of_files
    file, diagnosis = (named[0].file, named[0].diagnosis) if named else (None, None)
    return Difference("structure", found, "a whole checkpoint", file=file, diagnosis=diagnosis)


def check_structure(
    checkpoint: Checkpoint,
    source: Checkpoint,
    config_file: Path | None,
    of_files: Sequence[Difference],
) -> list[Difference]:
    """Return how config and tensors differ from those of the source."""
    wanted = source.config
    if checkpoint.config.tie_word_embeddings and not wanted.tie_word_embeddings:
        # It is the same model if the dropped head equals the embedding.
        wanted = replace(wanted, tie_word_embeddings=head_is_embedding(source))
    rows = vocabulary_size.rows(checkpoint.config, checkpoint.scheme, checkpoint.source.tensors)
    resized = of_vocabulary(rows, wanted.vocab_size)
    differences = []
    if differing := config_differences(checkpoint.config, wanted):
        beside = not config_file and (checkpoint.folder / CONFIG_FILE).is_file()
        file = CONFIG_FILE if beside else None
        edited = next((d.diagnosis for d in of_files if file and d.file == file), None)
        diagnosis = resized or edited
        differences.append(Difference("structure", *differing, file=file, diagnosis=diagnosis))
    try:
        match(checkpoint)
    except TensorFault as e:
        tensor, diagnosis = _faulty_tensor(checkpoint)
        found = "; ".join(e.problems)
        differences.append(
            Difference(
                "structure",
                found,
                "the tensors of the source",
                tensor=tensor,
                diagnosis=resized or diagnosis,
            )
        )
    return differences


def _faulty_tensor(checkpoint: Checkpoint) -> tuple[dict[str, str] | None, str | None]:
    """Return the names of the first tensor that is missing or has another shape, and what became of
    it."""
    findings = [
        f
        for f in survey(checkpoint.source.tensors, checkpoint.scheme, checkpoint.config)
        if f.tensor
    ]
    faulty = next((f for f in findings if f.problem), None)
    if not faulty or not faulty.tensor:
        return None, None
    missing = [f for f in findings if not f.info]
    text = None
    if faulty in missing:
        text = f"{len(missing)} of {len(findings)} tensors were left out"
    return names(faulty.tensor), text


def config_differences(found: GPTJConfig, expected: GPTJConfig) -> tuple[str, str] | None:
    """Return the fields that change the computation and differ, in words: found, and expected."""
    pairs = differing_fields(found, expected)
    differing = {name: pair for name, pair in pairs.items() if name not in NOT_COMPUTED}
    if not differing:
        return None
    sides = zip(*differing.values(), strict=True)
    found_text, expected_text = (
        ", ".join(f"{n} = {v!r}" for n, v in zip(differing, values, strict=True))
        for values in sides
    )
    return found_text, expected_text
