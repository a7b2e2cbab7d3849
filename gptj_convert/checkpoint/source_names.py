"""Tensors of a Hugging Face file under the table's names, whatever a wrapper has added to them.

Wrappers of a model leave their names in its state dict: `module.` of DistributedDataParallel,
`base_model.model.` of peft, `_orig_mod.` of torch.compile. The body alone (a GPTJModel) lacks
`transformer.`. Both are undone here, once, so that everything after reads exact names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gptj_model.errors import UsageError
from gptj_model.source import TensorInfo, TensorSource
from gptj_model.tensors import EMBEDDING, HF_BODY, is_hf_name

#: Name of the embedding in a GPTJModel alone.
_BARE_EMBEDDING = EMBEDDING.hf.removeprefix(HF_BODY)

#: Parts of names that wrappers insert anywhere, even around single blocks.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True, slots=True)
class SourceNames:
    """How a file's names become the table's."""

    in_file: Mapping[str, str]
    """Name in the file by the table's name; unknown tensors keep their own."""
    prefix: str = ""
    """Prefix of all names of the model."""
    without_body: bool = False
    """Whether the names lack `HF_BODY`."""
    wrappers: tuple[str, ...] = ()
    """Those of `WRAPPERS` that the names contain."""

    @property
    def notes(self) -> list[str]:
        """Notes on what was undone, one sentence each."""
        notes = []
        if self.wrappers:
            notes.append(f"{', '.join(self.wrappers)} removed from tensor names")
        if self.prefix:
            notes.append(f"prefix {self.prefix!r} removed from tensor names")
        if self.without_body:
            notes.append(f"missing prefix {HF_BODY!r} added to tensor names")
        return notes


def source_names(names: Iterable[str]) -> SourceNames:
    """Return what was put around the table's names, if the same was put around all of them."""
    listed = list(names)
    wrappers = tuple(w for w in WRAPPERS if any(w in name.split(".") for name in listed))
    plain = {name: _unwrapped(name) for name in listed}
    prefixes = model_prefixes(plain.values())
    prefix = prefixes[0] if len(prefixes) == 1 else ""
    in_file: dict[str, str] = {}
    added = False
    for name, inner in plain.items():
        inner = inner.removeprefix(prefix)
        if is_hf_name(HF_BODY + inner):
            inner, added = HF_BODY + inner, True
        # A name that is no tensor of GPT-J, or that occurs again, stays as it is.
        known = is_hf_name(inner) and inner not in in_file
        in_file[inner if known else name] = name
    return SourceNames(in_file, prefix, added, wrappers)


def model_prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefix of each GPT-J that a file holds; "" is none."""
    found: dict[str, None] = {}
    for name in names:
        for embedding in (EMBEDDING.hf, _BARE_EMBEDDING):
            if name == embedding or name.endswith("." + embedding):
                found[name.removesuffix(embedding)] = None
                break
    return list(found)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def matching(patterns: Sequence[str], name: str) -> bool:
    """Return whether a name is one of the shell patterns, or matches one."""
    return any(name == p or fnmatchcase(name, p) for p in patterns)


def refuse_unmatched(patterns: Sequence[str], dropped: Sequence[str]) -> None:
    """Refuse patterns that match no tensor of a checkpoint.

    Raises:
        UsageError: a pattern matches no tensor, and may be misspelled.
    """
    for pattern in patterns:
        if not any(matching([pattern], name) for name in dropped):
            raise UsageError(
                f"--drop {pattern}: the checkpoint has no tensor of this name",
                hint="list its tensors with `gptj inspect PATH`",
            )


class RenamedSource:
    """Tensors of a source under other names, as a `TensorSource`.

    Args:
        source: source of the tensors.
        in_file: the source's name by the new name; a tensor that is not listed is left out.

    Attributes:
        Names in the source, by new name.
    """

    def __init__(self, source: TensorSource, in_file: Mapping[str, str]) -> None:
        self._source = source
        self.in_file = in_file
        self.tensors: dict[str, TensorInfo] = {
            name: source.tensors[inner] for name, inner in in_file.items()
        }

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Implement `TensorSource`."""
        self._source.read_into(self.in_file[name], offset, buffer)

    def close(self) -> None:
        """Close the source."""
        self._source.close()
