"""`gptj data inspect`: look at training records, and check every one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.shared.command import PATH, command
from runner.cli.shared.output import Output, printable
from runner.cli.shared.progress import progress

if TYPE_CHECKING:
    from runner.data.inspection import RecordsSummary

#: Lines of the histogram are as long as this.
_BAR = 40
#: Characters of a piece of a sample, and tokens that are listed.
_PIECE, _MOST = 300, 15


@command
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--tokenizer", type=PATH, help="Folder with tokenizer.json, to show text, not ids.")
@click.option("--samples", type=click.IntRange(min=0), default=3, show_default=True)
@click.option("--html", type=PATH, metavar="FILE", help="Also write a page with plots.")
def inspect(
    output: Output, folder: Path, tokenizer: Path | None, samples: int, html: Path | None
) -> dict[str, Any]:
    """Check every record of DIR, and print counts, lengths, tokens and samples.

    DIR holds TFRecords (perhaps compressed with gzip) or HDF5 files, or folders with such. Held
    against what is right are checksums, lengths, ids, masks, and data_params.json where it is. The
    first damage ends it, with file, record and offset. In samples, what the loss counts is
    coloured.
    """
    from runner.data import inspection
    from runner.data.inspection_page import write_page

    decode = _decoder(tokenizer)
    found: dict[str, RecordsSummary] = {}
    for name, path in inspection.find_sets(folder).items():
        with progress(output, "checking") as report:
            events = inspection.summarize_records(
                path, vocab_size=_vocabulary(tokenizer), samples=samples
            )
            found[name] = _drain(events, report)
        _show(output, name, found[name], decode)
    if html:
        write_page(html, found, decode, decoded=tokenizer is not None)
        output.note(f"page: {html}")
    fields = {name: inspected.to_json() for name, inspected in found.items()}
    return {"path": str(folder), **fields.get("", {"parts": fields})}


def _drain(events: Any, report: Any) -> Any:
    while True:
        try:
            event = next(events)
        except StopIteration as e:
            return e.value
        report(event.done, event.total, event.what)


def _decoder(folder: Path | None) -> Callable[[Sequence[int]], str]:
    if folder is None:
        return lambda ids: " ".join(map(str, ids))
    from runner.data.making.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def _vocabulary(folder: Path | None) -> int | None:
    if folder is None:
        return None
    from runner.data.making.tokenizer import load_tokenizer

    return load_tokenizer(folder).get_vocab_size()


def _show(
    output: Output, name: str, found: RecordsSummary, decode: Callable[[Sequence[int]], str]
) -> None:
    facts = found.to_json()
    output.data(
        f"{name or found.path}: {found.examples:,} examples of {found.length} tokens in "
        f"{len(found.files)} files, {found.bytes / 1e6:.1f} MB, every record whole"
    )
    output.data(
        f"{found.tokens:,} tokens: {facts['counted_share']:.2%} count in the loss, "
        f"{facts['padding_share']:.2%} are padding; {facts['distinct_ids']:,} distinct ids, "
        f"{facts['end_of_text']:,} ends of text"
    )
    output.data("\nexamples by tokens before the padding:")
    bars = found.bars()
    highest = max(n for *_, n in bars)
    for first, last, n in bars:
        if n:
            output.data(f"{first:>7} – {last:<7} {n:>11,}  {'█' * -(-_BAR * n // highest)}")
    output.data("\nthe most frequent tokens:")
    for token, n in found.most_frequent(_MOST):
        output.data(f"{token:>7} {n:>11,}  {decode([token])!r}")
    for number, sample in enumerate(found.samples, start=1):
        output.data(f"\nsample {number}:")
        _show_sample(output, sample, decode)


def _show_sample(output: Output, sample: Any, decode: Callable[[Sequence[int]], str]) -> None:
    from rich.text import Text

    from runner.data.inspection_page import pieces

    text = Text()
    for counts, piece in pieces(sample, decode, limit=_PIECE):
        text.append(printable(piece), style="green" if counts else "dim")
    output.coloured(text)
