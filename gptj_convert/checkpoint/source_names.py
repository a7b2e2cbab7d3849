"""Tensors of a Hugging Face file under the table's names, whatever put its own words around them.

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

#: What a GPTJForCausalLM calls the GPTJModel in it.
_BARE_EMBEDDING = EMBEDDING.hf.removeprefix(HF_BODY)

#: Parts of names that wrappers put in anywhere, around single blocks too.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True, slots=True)
class SourceNames:
    """How a file's names become the table's."""

    in_file: Mapping[str, str]
    """The name in the file, by the table's name; of an unknown tensor by its own."""
    prefix: str = ""
    """What was before the names of all of the model."""
    without_body: bool = False
    """Whether the names lacked `HF_BODY`."""
    wrappers: tuple[str, ...] = ()
    """Those of `WRAPPERS` that were in names."""

    @property
    def notes(self) -> list[str]:
        """What was undone, one sentence each."""
        notes = []
        if self.wrappers:
            notes.append(f"{', '.join(self.wrappers)} in names of tensors is left out")
        if self.prefix:
            notes.append(f"names of tensors begin with {self.prefix!r}, which is left out")
        if self.without_body:
            notes.append(f"names of tensors lack {HF_BODY!r}, which is added")
        return notes


def source_names(names: Iterable[str]) -> SourceNames:
    """Find what was put around the table's names, if one thing was put around all of them."""
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
        # What is no tensor of a GPT-J, or is one for the second time, keeps its name.
        known = is_hf_name(inner) and inner not in in_file
        in_file[inner if known else name] = name
    return SourceNames(in_file, prefix, added, wrappers)


def model_prefixes(names: Iterable[str]) -> list[str]:
    """What is before the names of each GPT-J that a file holds, "" for none."""
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
    """Whether one of the patterns, as a shell has them, is a tensor's name or matches it."""
    return any(name == p or fnmatchcase(name, p) for p in patterns)


def refuse_unmatched(patterns: Sequence[str], dropped: Sequence[str]) -> None:
    """Refuse patterns that name no tensor of a checkpoint.

    Raises:
        UsageError: one does not; it may be misspelt.
    """
    for pattern in patterns:
        if not any(matching([pattern], name) for name in dropped):
            raise UsageError(
                f"--drop {pattern}: the checkpoint has no tensor of this name",
                hint="list its tensors with `gptj inspect PATH`",
            )


class RenamedSource:
    """The tensors of a source under other names, as `gptj_model.source.TensorSource`.

    Args:
        source: of the tensors.
        in_file: the source's name by the new one; a tensor that is not among them is left out.

    Attributes:
        in_file: as given.
    """

    def __init__(self, source: TensorSource, in_file: Mapping[str, str]) -> None:
        self._source = source
        self.in_file = in_file
        self.tensors: dict[str, TensorInfo] = {
            name: source.tensors[inner] for name, inner in in_file.items()
        }

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource.read_into`."""
        self._source.read_into(self.in_file[name], offset, buffer)

    def close(self) -> None:
        """Close the source."""
        self._source.close()
