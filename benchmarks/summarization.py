"""A small fine-tune for summarization, judged before and after: does ROUGE-L rise?

    python benchmarks/summarization.py WORK_FOLDER [--steps 600] [--limit 100]

The task uses what every Python has: the docstrings of its standard library. The article is
the body of a docstring, the summary its first line; every tenth pair is kept aside as a test set.
A small random GPT-J (`gptj new --preset tiny`) is trained on the records that `gptj data
summarization` makes, and `gptj eval --task summarization` scores it before and after, beside what
needs no model: the article's own first words. Prints the table of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GPTJ = (sys.executable, "-m", "runner.cli.root")
LENGTH = 256
METRICS = ("rouge1", "rouge2", "rougeL")


def pairs() -> Iterator[dict[str, str]]:
    """Return body and first line of every docstring of the standard library that has both."""
    seen = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "idle_test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                first, _, body = (ast.get_docstring(node) or "").partition("\n\n")
                summary, body = " ".join(first.split()), " ".join(body.split())
                if 20 <= len(summary) <= 100 and len(body) >= 2 * len(summary):
                    article = f"{getattr(node, 'name', path.stem)}: {body[:600]}"
                    if article not in seen:
                        seen.add(article)
                        yield {"article": article, "highlights": summary}


def gptj(*arguments: object) -> dict[str, Any]:
    """Run a command and return its JSON object."""
    command = [*GPTJ, *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def first_words(rows: list[dict[str, str]]) -> dict[str, float]:
    """Return the scores of each article's first ten words."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(METRICS, use_stemmer=True)
    found = [scorer.score(row["highlights"], " ".join(row["article"].split()[:10])) for row in rows]
    return {m: 100 * sum(s[m].fmeasure for s in found) / len(found) for m in METRICS}


def main() -> None:
    """Make the task, train, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--limit", type=int, default=100)
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True)
    rows = list(pairs())
    test = rows[::10]
    for name, part in (("train", [r for n, r in enumerate(rows) if n % 10]), ("test", test)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    model, data, run = folder / "model", folder / "data", folder / "model_dir"
    gptj("new", "--preset", "tiny", "--out", model)
    columns = ("--article-column", "article", "--summary-column", "highlights")
    gptj("data", "summarization", folder / "train.jsonl", "--tokenizer", model, *columns,
         "--max-sequence-length", LENGTH, "--out", data)  # fmt: skip
    settings = {
        "train_input.data_dir": data,
        "train_input.max_sequence_length": LENGTH,
        "train_input.batch_size": 16,
        "optimizer.learning_rate": 0.001,
        "runconfig.save_checkpoints_steps": 10**6,
    }
    given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    converted = folder / "converted"
    gptj("convert", model, "--to", "tf", "--out", converted)
    judge = ("eval", "--task", "summarization", "--data", folder / "test.jsonl", "--beams", 1,
             "--beams", 4, "--max-new-tokens", 24, "--limit", options.limit)  # fmt: skip
    before = gptj(*judge, "--model", model)["metrics"]
    gptj("train", "--init-from", converted, *given, "--max-steps", options.steps,
         "--model-dir", run)  # fmt: skip
    after = gptj(*judge, "--model", run)["metrics"]
    print(f"{len(rows) - len(test)} pairs to train on, {min(len(test), options.limit)} to judge.\n")
    print("| | ROUGE-1 | ROUGE-2 | ROUGE-L |\n| --- | --- | --- | --- |")
    table = {"the article's first ten words": first_words(test[: options.limit])}
    for decoding in ("greedy", "beam4"):
        for when, found in (("before", before), ("after", after)):
            table[f"{when}, {decoding}"] = {m: found[f"{decoding}/{m}"] for m in METRICS}
    for name, scores in table.items():
        print(f"| {name} | " + " | ".join(f"{scores[m]:.1f}" for m in METRICS) + " |")


if __name__ == "__main__":
    main()
