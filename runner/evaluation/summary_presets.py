"""Test sets of summaries whose format and settings others have fixed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Settings of a published benchmark; each can be overridden by an option."""

    article: str
    """Key of the article."""
    summary: str
    """Key of the summary."""
    template: str
    """Jinja template of an instruction, its input and its output."""
    longest: int
    """Number of tokens that a prompt is cut to, from its beginning on."""
    beams: int
    least: int
    """Smallest number of tokens in a summary."""
    most: int
    """Largest number of tokens in a summary."""


#: MLPerf Inference's GPT-J benchmark, from mlcommons/inference, language/gpt-j: download_cnndm.py
#: (keys), dataset.py (prompt, which ends without a newline; length) and backend.py (search).
MLPERF = Preset(
    article="input",
    summary="output",
    template=(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{{ instruction }}\n\n### Input:\n{{ input }}\n\n"
        "### Response:{{ output }}"
    ),
    longest=1919,
    beams=4,
    least=30,
    most=128,
)
PRESETS = {"mlperf": MLPERF}
