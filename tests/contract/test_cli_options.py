"""The public options, frozen: other programs call them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import click

from gptj_model import __version__
from runner.cli.root import root

COMMON = {"--json", "--quiet"}
BUILDING = {
    "--tokenizer", "--allow-special", "--max-sequence-length", "--out", "--format", "--gzip",
    "--files-per-record", "--write-remainder", "--processes", "--on-error", "--shard", "--resume",
    "--force", "--staging",
}  # fmt: skip
PACKING = {
    "--short-seq-prob", "--seed", "--reference-remainder", "--ftfy", "--ftfy-normalizer",
    "--wikitext-detokenize",
}  # fmt: skip
DOWNLOADING = {"--download", "--repository", "--part"}
OPTIONS = {
    "convert": {
        "--to", "--out", "--dtype", "--max-shard-size", "--vocab-size", "--share-embeddings",
        "--adapter", "--drop", "--optimizer-state", "--param-groups", "--cs-backend", "--config",
        "--dry-run", "--saturate", "--resume", "--force",
    },
    "data inspect": {"--tokenizer", "--samples", "--html"},
    "data instruct": BUILDING | {
        "--template", "--columns", "--train-on-prompt", "--packing", "--too-long",
    },
    "data merge": {"--out", "--copy", "--force"},
    "data pile": BUILDING | PACKING | DOWNLOADING | {"--text-key"},
    "data summarization": BUILDING | DOWNLOADING | {
        "--article-column", "--summary-column", "--truncate-article", "--compare-bytes",
        "--allow-longer-abstracts", "--test-set",
    },
    "data text": BUILDING | PACKING | {"--glob"},
    "doctor": {"--plan"},
    "download": {"--revision", "--out"},
    "eval": {
        "--model", "--backend", "--params", "--eval-steps", "--execution", "--memory", "--set",
        "--task", "--data", "--window", "--stride", "--batch-size",
        "--beams", "--max-new-tokens", "--min-new-tokens", "--limit", "--truncate-article",
        "--summaries", "--article-column", "--summary-column", "--template", "--preset",
        "--include-path", "--num-fewshot", "--work-dir",
    },
    "generate": {
        "--model", "--backend", "--prompt", "--ids", "--prompts", "--template", "--chat",
        "--batch-size", "--truncate",
        "--max-new-tokens", "--min-new-tokens", "--stop", "--temperature", "--top-k", "--top-p",
        "--repetition-penalty", "--no-repeat-ngram-size", "--num-beams", "--length-penalty",
        "--early-stopping", "--num-return-sequences", "--seed", "--logprobs", "--dtype",
        "--execution", "--memory",
    },
    "export saved-model": {
        "--out", "--dtype", "--max-length", "--config", "--dry-run", "--force",
    },
    "golden record": {"--out", "--dtype", "--note", "--config", "--force"},
    "inspect": {
        "--stats", "--check", "--diff", "--config", "--public-key", "--identity",
        "--identity-provider",
    },
    "new": {
        "--preset", "--out", "--seed", "--set", "--dtype", "--file-format", "--layout",
        "--max-shard-size", "--force",
    },
    "runs": {"--html", "--follow"},
    "train": {
        "--init-from", "--checkpoint-path", "--adapter", "--params", "--model-dir", "--mode",
        "--max-steps", "--steps", "--epochs", "--eval-steps", "--execution", "--backend", "--set",
        "--workers", "--strict", "--validate-only", "--compile-only", "--cs-ip", "--target",
        "--run-py", "--dry-run",
    },
    "verify": {
        "--against", "--backend", "--against-golden", "--tolerance", "--level", "--thorough",
        "--keep-going", "--report", "--self-test", "--adapter", "--config", "--task",
        "--include-path", "--num-fewshot", "--limit",
    },
}  # fmt: skip


def _options(group: click.Group, prefix: str = "") -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= _options(command, f"{prefix}{name} ")
        else:
            options = (p for p in command.params if isinstance(p, click.Option))
            found[prefix + name] = {o for p in options for o in p.opts}
    return found


def test_commands_and_options_are_the_published_ones():
    assert _options(root) == {name: own | COMMON for name, own in OPTIONS.items()}


def test_every_option_is_explained():
    for command in (c for c in root.commands.values() if not isinstance(c, click.Group)):
        assert command.help, command.name


def test_version_lists_the_libraries(gptj):
    lines = gptj("--version").stdout.splitlines()
    assert lines[0] == f"gptj, version {__version__}"
    assert f"numpy {metadata.version('numpy')}" in lines
    assert f"tensorflow {metadata.version('tensorflow-cpu')}" in lines


def test_a_shell_completes_commands():
    words = {"_GPTJ_COMPLETE": "bash_complete", "COMP_WORDS": "gptj ver", "COMP_CWORD": "1"}
    program = "import sys; from runner.cli.root import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | words, capture_output=True, text=True
    )
    assert done.stdout == "plain,verify\n"
