"""Tasks of the harness with local data, for tests of what asks them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: Shared prefixes, choices of one token and of many, a text without context, other scripts.
CHOICES = [
    {
        "blank": "",
        "question": f"{n} and {n}? " + "Think it over. " * 4 * n,
        "choices": [str(2 * n), "é 你 x", f" {n}"],
    }
    for n in range(7)
]
TEXTS = ["A fox. ", "The quick brown fox jumps over the lazy dog, café. " * 9, " x\n", "y" * 300]

CHOICE = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: 0
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
LIKELIHOOD = """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{blank}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
TEXT = """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "fox,"], max_gen_toks: 12}
metric_list: [{metric: exact_match}, {metric: bleu}]
"""


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    for name, rows, text in (
        ("local_choice", CHOICES, CHOICE),
        ("local_rolling", [{"text": text} for text in TEXTS], ROLLING),
        ("local_text", CHOICES, TEXT),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + files + text, encoding="utf-8")


@contextmanager
def task_folder(folder: Path) -> Iterator[None]:
    """Write the tasks to folder/tasks, and let the library that loads their data cache it there."""
    import datasets

    write_tasks(folder / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield
