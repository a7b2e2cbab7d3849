"""README.md of a result that others load: metadata for the hub, and a text about its origin.

It holds no time and no path of the output, so the same conversion gives the same file.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.lineage import ADAPTER, FINETUNE, QUANTIZED, Lineage
from gptj_convert.conversion.origin import has_adapter, lineage, result_lineage, stated_origin
from gptj_convert.conversion.plan import Plan
from gptj_convert.conversion.source_card import BEGIN, END, RESULTS, SourceCard, read_card
from gptj_convert.formats.layouts.hf import CARD_FILE, GENERATION_FILE, TOKENIZER_FILES
from gptj_convert.hub.address import is_repository
from gptj_convert.hub.download import read_record
from gptj_model import __version__
from gptj_model.config import CONFIG_FILE
from gptj_model.dtypes import is_lossless
from gptj_model.lora import Lora
from gptj_model.optimizer_names import Grouping

_TEMPLATE = "card.md.j2"
_TASK = "text-generation"
_OTHER_RESULTS = (
    f"The evaluation results in the source's card ({RESULTS}) are of other weights and are left out"
)


def model_card(checkpoint: Checkpoint, plan: Plan, notes: Sequence[str]) -> str:
    """Return the model card of a conversion to Hugging Face's format.

    Args:
        checkpoint: source of the conversion.
        plan: the conversion.
        notes: further facts about the result, one sentence each.
    """
    found, source = result_lineage(checkpoint, plan), read_card(checkpoint.folder)
    metadata = _metadata(source, found, "transformers", ["gptj"])
    changes = [*_changes(checkpoint, plan), *notes]
    if RESULTS in source.metadata:
        if _is_of_result(source, found, lineage(checkpoint)):
            metadata[RESULTS] = source.metadata[RESULTS]
        else:
            changes.append(f"{_OTHER_RESULTS}.")
    count = sum(m.tensor.size for m in plan.weights)
    values = {
        "title": f"GPT-J, {count:,} parameters, {plan.dtype}",
        "summary": _summary(found),
        "facts": [
            *_facts(checkpoint, found),
            ("Converted by", f"gptj {__version__}, `{_shown(_command(checkpoint, plan))}`"),
            ("Dtype", plan.dtype),
        ],
        "changes": changes,
        "verification": "The conversion wrote this card, before any verification. "
        "`manifest.json` records a SHA-256 of every file and a CRC-32C of every tensor, in the "
        "source and here. These commands compare the files with it, and the model with its source: "
        "the weights bit for bit, then the logits.",
        "commands": "\n".join(
            ["gptj inspect . --check", *_source_commands(checkpoint), _verify(checkpoint)]
        ),
        "code": _loading(any(name in TOKENIZER_FILES for name in checkpoint.companions)),
    }
    return _render(metadata, source, values)


def card_notes(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Return what people should know about the card of a conversion before they publish it."""
    source = read_card(checkpoint.folder)
    result = result_lineage(checkpoint, plan)
    if RESULTS in source.metadata and not _is_of_result(source, result, lineage(checkpoint)):
        return [*source.notes, f"{CARD_FILE}: {_OTHER_RESULTS[0].lower()}{_OTHER_RESULTS[1:]}"]
    return source.notes


def adapter_card(checkpoint: Checkpoint, lora: Lora) -> str:
    """Return the model card of the adapter of a run.

    Args:
        checkpoint: checkpoint of a run with LoRA.
        lora: its adapter.
    """
    base, source = stated_origin(checkpoint.folder), read_card(checkpoint.folder)
    repository = base if base and is_repository(base) else None
    found = lineage(checkpoint)
    found = Lineage(
        repository=repository,
        relation=ADAPTER,
        step=found.step,
        records=found.records,
        data_sets=found.data_sets,
    )
    named = repository or "BASE"
    values = {
        "title": f"LoRA adapter for GPT-J, rank {lora.rank}",
        "summary": "This folder holds a LoRA adapter for a GPT-J language model, in the format of "
        "the peft library. The base model is not in it.",
        "facts": [
            *_facts(checkpoint, found),
            ("Converted by", f"gptj {__version__}, `gptj convert {_path(checkpoint)} --to peft`"),
            ("Rank, alpha", f"{lora.rank}, {lora.alpha:g}"),
            ("Adapted layers", ", ".join(lora.targets)),
            ("Dtype", "float32"),
        ],
        "changes": [
            "The matrices A and B of every adapted layer are those of the run, in the layout of "
            "the peft library.",
            "The base model of the run is left out.",
        ],
        "verification": "The conversion wrote this card, before any verification. These commands "
        "merge the adapter into its base, and compare the result with the run.",
        "commands": f"gptj convert {shlex.quote(named)} --adapter . --to hf --out merged\n"
        f"gptj verify merged --against {_path(checkpoint)}",
        "code": "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{named}", dtype="auto")\n'
        'model = PeftModel.from_pretrained(base, ".")',
    }
    return _render(_metadata(source, found, "peft", ["gptj", "lora"]), source, values)


def _metadata(
    source: SourceCard, found: Lineage, library: str, tags: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of the front matter: those of the source, changed where the result
    differs."""
    kept = {key: value for key, value in source.metadata.items() if key != RESULTS}
    relation = found.relation
    if found.repository:
        kept |= {"base_model": found.repository, "base_model_relation": relation}
    elif kept.get("base_model"):
        kept["base_model_relation"] = relation or kept.get("base_model_relation")
    else:
        kept.pop("base_model_relation", None)
    own = _as_list(kept.get("tags"))
    kept["tags"] = [*own, *(tag for tag in tags if tag not in own)]
    if found.data_sets:
        own = _as_list(kept.get("datasets"))
        kept["datasets"] = [*own, *(name for name in found.data_sets if name not in own)]
    return {"pipeline_tag": _TASK} | kept | {"library_name": library}


def _is_of_result(source: SourceCard, found: Lineage, before: Lineage) -> bool:
    """Return whether the source's card describes the very weights of the result: they were not
    altered now, nor since the card was written."""
    stated = source.metadata.get("base_model_relation")
    return found.relation == before.relation and found.relation in (None, stated)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _summary(found: Lineage) -> str:
    text = "This folder holds a GPT-J language model in the format of Hugging Face Transformers."
    base = found.repository or "a model that no repository is recorded for"
    became = {
        None: f" Its weights are those of {base}." if found.repository else "",
        FINETUNE: f" It was trained from {base}.",
        QUANTIZED: f" Its weights are those of {base}, rounded to a narrower dtype.",
    }
    return text + became[found.relation]


def _facts(checkpoint: Checkpoint, found: Lineage) -> list[tuple[str, str]]:
    """Return rows about where the weights come from."""
    facts = [("Converted from", f"`{_name(checkpoint.path)}`, {_FORMATS[checkpoint.scheme.value]}")]
    if found.repository:
        at = f" at commit {found.commit}" if found.commit else ", at an unrecorded commit"
        facts.append(("Base model", f"[{found.repository}](https://hf.co/{found.repository}){at}"))
    else:
        facts.append(("Base model", "no repository on the hub is recorded"))
    if found.step:
        facts.append(("Trained with", f"gptj, up to step {found.step:,}"))
    if found.records:
        facts.append(("Training records", ", ".join(f"`{_shown(name)}`" for name in found.records)))
    if found.data_sets:
        links = (f"[{name}](https://hf.co/datasets/{name})" for name in found.data_sets)
        facts.append(("Training data", ", ".join(links)))
    return facts


_FORMATS = {
    "hf": "a checkpoint of Hugging Face Transformers",
    "tf": "a checkpoint of TensorFlow",
    "keras": "a checkpoint of Keras",
    "cs": "a checkpoint of the Cerebras client",
}


def _changes(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Return sentences about how the result differs from its source."""
    changes = [_rounding(checkpoint, plan)]
    if plan.config.tie_word_embeddings:
        changes.append("The output head is the embedding, and is not stored a second time.")
    if checkpoint.dropped:
        names = ", ".join(f"`{_shown(name)}`" for name in checkpoint.dropped)
        changes.append(f"Dropped, since they are not part of GPT-J: {names}.")
    if merged := checkpoint.adapter:
        changes.append(
            f"The adapter `{_name(merged.folder)}` is merged in float32: {len(merged.updates)} "
            f"kernels updated, {len(merged.replaced)} tensors replaced."
        )
    if has_adapter(checkpoint):
        changes.append("The LoRA adapter of the run is merged into its kernels.")
    if plan.continuation:
        step = plan.continuation.state.step
        changes.append(f"`optimizer.pt` holds the state of the optimizer after step {step}.")
    if not any(name in TOKENIZER_FILES for name in checkpoint.companions):
        changes.append("There were no tokenizer files beside the source, so there are none here.")
    if not checkpoint.config_file and GENERATION_FILE not in checkpoint.companions:
        end = plan.config.eos_token_id
        stated = "that nothing ends a text" if end is None else f"token {end}"
        changes.append(
            f"No file of the source says where texts end; `{GENERATION_FILE}` states {stated}."
        )
    return changes


def _rounding(checkpoint: Checkpoint, plan: Plan) -> str:
    pairs = {(checkpoint.stored_dtype(m.source_name), m.target.dtype) for m in plan.weights}
    changed = [
        f"Tensors of {a} became {b}, {'without loss' if is_lossless(a, b) else 'rounded'}."
        for a, b in sorted(pairs)
        if a != b
    ]
    return " ".join(changed) or "Every tensor keeps its dtype and its values."


def _license(source: SourceCard) -> str:
    carried = ", ".join(f"[{name}]({name})" for name in source.license_files)
    beside = f" Carried from the source, bit for bit: {carried}." if carried else ""
    if source.license:
        return f"The card of the source names this license: {source.license}.{beside}"
    return f"The card of the source names no license, so this one names none.{beside}"


def _command(checkpoint: Checkpoint, plan: Plan) -> str:
    """Return the command that repeats the conversion, without the name of its output."""
    words = ["gptj", "convert", _path(checkpoint), "--to", plan.scheme.value]
    targets = {m.target.dtype for m in plan.weights}
    if any(checkpoint.stored_dtype(m.source_name) != m.target.dtype for m in plan.weights):
        words += ["--dtype", *sorted(targets)]
    if plan.max_shard_bytes:
        words += ["--max-shard-size", str(plan.max_shard_bytes)]
    if checkpoint.vocab_choice:
        words += ["--vocab-size", checkpoint.vocab_choice]
    words += [word for name in checkpoint.dropped for word in ("--drop", shlex.quote(name))]
    if plan.shares_embeddings:
        words.append("--share-embeddings")
    if checkpoint.adapter:
        words += ["--adapter", shlex.quote(_name(checkpoint.adapter.folder))]
    if plan.continuation:
        words.append("--optimizer-state")
        if plan.continuation.grouping is not Grouping.ONE:
            words += ["--param-groups", plan.continuation.grouping.value]
    config = checkpoint.config_file
    if config and config != checkpoint.folder / CONFIG_FILE:
        words += ["--config", shlex.quote(_name(config))]
    return " ".join([*words, "--saturate"] if plan.saturate else words)


def _verify(checkpoint: Checkpoint) -> str:
    """Return the command that compares the result with its source."""
    source = "source" if read_record(checkpoint.folder) else _path(checkpoint)
    adapter = checkpoint.adapter
    more = f" --adapter {shlex.quote(_name(adapter.folder))}" if adapter else ""
    return f"gptj verify . --against {source}{more}"


def _source_commands(checkpoint: Checkpoint) -> list[str]:
    """Return the command that fetches the source again, if it is on the hub."""
    record = read_record(checkpoint.folder)
    if not record:
        return []
    return [f"gptj download {record.repository} --revision {record.commit} --out source"]


def _path(checkpoint: Checkpoint) -> str:
    """Return how a command names the source: by its repository, or by its name alone, since a
    published card should not show the folders of a machine."""
    if record := read_record(checkpoint.folder):
        return f"{record.repository}@{record.commit}"
    return shlex.quote(_name(checkpoint.path))


def _name(path: Path) -> str:
    return _shown(Path(os.path.normpath(path.absolute())).name)


def _shown(name: str) -> str:
    """Return a name without the characters that would end a cell or a code span of Markdown."""
    return "".join(c if c.isprintable() and c not in "`|" else "?" for c in name)


def _loading(has_tokenizer: bool) -> str:
    names = "AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM"
    lines = [
        f"from transformers import {names}",
        "",
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")',
    ]
    if has_tokenizer:
        lines.append('tokenizer = AutoTokenizer.from_pretrained(".")')
    return "\n".join(lines)


def _render(metadata: Mapping[str, Any], source: SourceCard, values: Mapping[str, Any]) -> str:
    """Return a card as text.

    Args:
        metadata: fields of the front matter.
        source: card of the source, whose text follows.
        values: variables of the template.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    data = ModelCardData()
    for key, value in metadata.items():
        data[key] = value
    # Markdown is written, not HTML.
    environment = Environment(
        autoescape=False, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    template = (files(__package__ or "") / _TEMPLATE).read_text(encoding="utf-8")
    body = environment.from_string(template).render(
        values,
        begin=BEGIN,
        end=END,
        license=_license(source),
        source_text=source.text,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"
