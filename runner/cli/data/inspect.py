"""`gptj data inspect`: check every training record, and show samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.shared.command import command
from runner.cli.shared.options import COUNT_OR_ZERO, PLACE, html_option, tokenizer_option
from runner.cli.shared.output import Output
from runner.cli.shared.progress import follow

if TYPE_CHECKING:
    from runner.data.inspection import RecordsSummary

#: Characters of the longest bar of the histogram.
_BAR = 40
#: Characters of one piece of a sample, and number of tokens listed.
_PIECE, _MOST = 300, 15
#: Signs around what the loss counts, and around special tokens, where there are no colors.
_MARKS = ("⟦", "⟧"), ("‹", "›")
#: Signs where there are colors.
_NO_MARKS = ("", ""), ("", "")


@command(
    "gptj data inspect data --tokenizer gpt-j-6b",
    "gptj data inspect data --samples 0 --html records.html",
)
@click.argument("folder", metavar="DIR", type=PLACE)
@tokenizer_option(required=False, more="; shows text instead of ids")
@click.option(
    "--samples",
    type=COUNT_OR_ZERO,
    default=3,
    show_default=True,
    help="Number of examples to print.",
)
@html_option("plots and samples")
def inspect(
    output: Output, folder: Path, tokenizer: Path | None, samples: int, html: Path | None
) -> dict[str, Any]:
    """Check every record of DIR, and print counts, lengths, frequent tokens and samples.

    DIR holds TFRecords (also gzip-compressed) or HDF5 files, or folders of them; it may also be an
    .index that lists record files. Records of GPT-J's original trainer, with the feature `text`,
    are read too. Checksums, lengths, ids, masks and data_params.json are checked; the first damaged
    record ends the command with its file, number and offset. In samples, the tokens that the loss
    counts are green and special tokens are bold; without colors, they are between ⟦ and ⟧, and
    between ‹ and ›.
    """
    from runner.cli.shared.fetching import local_folder
    from runner.data import inspection
    from runner.data.inspection_page import write_page

    decode, special = _decoder(tokenizer), _special(tokenizer)
    found: dict[str, RecordsSummary] = {}
    for name, path in inspection.find_sets(local_folder(output, folder)).items():
        work = inspection.summarize_records(
            path, vocab_size=_vocabulary(tokenizer), samples=samples
        )
        found[name] = follow(output, "checking", work)
        _show(output, name, found[name], decode, special)
    if html:
        write_page(html, found, decode, decoded=tokenizer is not None, special=special)
        output.note(f"page: {html}")
    fields = {name: inspected.to_json() for name, inspected in found.items()}
    return {"path": str(folder), **fields.get("", {"parts": fields})}


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


def _special(folder: Path | None) -> Collection[int]:
    """Return the ids of special tokens."""
    if folder is None:
        return ()
    from runner.data.making.tokenizer import SpecialNames, load_tokenizer

    return frozenset(SpecialNames(load_tokenizer(folder)).all.values())


def _show(
    output: Output,
    name: str,
    found: RecordsSummary,
    decode: Callable[[Sequence[int]], str],
    special: Collection[int],
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
    for reason, n in found.left_out():
        output.data(f"{n:,} documents {reason}")
    for template, text in found.templates().items():
        output.data(f"\ntemplate {template}:\n{text}")
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
        _show_sample(output, sample, decode, special)


def _show_sample(
    output: Output,
    sample: Any,
    decode: Callable[[Sequence[int]], str],
    special: Collection[int],
) -> None:
    from itertools import groupby

    from rich.console import Console

    from runner.data.inspection_page import pieces

    console = Console()
    has_colors = console.color_system and not console.no_color
    (begin, end), around_special = _NO_MARKS if has_colors else _MARKS
    shown: list[tuple[str, str]] = []
    found = pieces(sample, decode, special, limit=_PIECE)
    for counts, group in groupby(found, key=lambda piece: piece.counts):
        style = "green" if counts else "dim"
        shown.append((begin if counts else "", style))
        for piece in group:
            text = piece.text.join(around_special) if piece.special else piece.text
            shown.append((text, f"bold {style}" if piece.special else style))
        shown.append((end if counts else "", style))
    output.coloured(shown)
