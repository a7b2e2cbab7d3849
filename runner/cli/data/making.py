"""`gptj data`: text into training records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.data.download import PILE, SUMMARIES, Published, downloading, fetch_parts
from runner.cli.data.inspect import inspect
from runner.cli.shared.command import PATH, command
from runner.cli.shared.output import Output
from runner.cli.shared.progress import progress

if TYPE_CHECKING:
    from runner.data.making.build import Counts, Recipe
    from runner.data.making.sources import Part

DEFAULT_OUT = Path("data")
#: What `gptj data pile` reads in folders.
PILE_FILES = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.txt", "*.txt.gz", "*.txt.zst", "*.parquet")
#: And `gptj data summarization`.
PAIR_FILES = ("*.bin", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.parquet")
#: Bad documents that are named one by one.
_NAMED = 20

PROBABILITY = click.FloatRange(min=0, max=1)


@click.group()
def data() -> None:
    """Make training records, and look at them."""


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return add


#: What every command takes that makes records.
_building = _options(
    click.argument("sources", metavar="SRC...", type=PATH, nargs=-1),
    click.option(
        "--tokenizer",
        type=PATH,
        required=True,
        help="Folder with tokenizer.json, or with a vocabulary and merges.",
    ),
    click.option(
        "--allow-special",
        is_flag=True,
        help="Read the names of special tokens in a text, such as <|endoftext|>, as these tokens; "
        "else they are text.",
    ),
    click.option(
        "--max-sequence-length", type=click.IntRange(min=1), default=2048, show_default=True
    ),
    click.option("--out", type=PATH, default=DEFAULT_OUT, show_default=True, help="Folder."),
    click.option(
        "--format",
        "file_format",
        type=click.Choice(["tfrecord", "hdf5"]),
        default="tfrecord",
        show_default=True,
        help="hdf5 is what the current CS client reads.",
    ),
    click.option("--gzip", "compress", is_flag=True, help="Compress the TFRecords."),
    click.option(
        "--files-per-record",
        type=click.IntRange(min=1),
        default=8192,
        show_default=True,
        help="Examples in a record file.",
    ),
    click.option(
        "--write-remainder/--no-write-remainder",
        default=True,
        show_default=True,
        help="Also the last file, which does not get full.",
    ),
    click.option(
        "--processes",
        type=click.IntRange(min=1),
        help="That tokenise; the records are the same.  [default: the number of cores]",
    ),
    click.option(
        "--on-error",
        type=click.Choice(["stop", "skip"]),
        default="stop",
        show_default=True,
        help="At a bad document.",
    ),
    click.option("--resume", is_flag=True, help="Go on with an interrupted run."),
    click.option("--force", is_flag=True, help="Replace an existing folder, or begin anew."),
)
#: What commands take that pack text.
_packing = _options(
    click.option(
        "--short-seq-prob",
        type=PROBABILITY,
        default=0.0,
        show_default=True,
        help="Share of sequences that are shortened, by a random number of tokens.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of that."),
    click.option(
        "--reference-remainder",
        is_flag=True,
        help="Drop the tokens that the reference drops: the last, incomplete sequence, and what "
        "--short-seq-prob cuts off.",
    ),
    click.option("--ftfy", is_flag=True, help="Repair mojibake, and normalise, with ftfy."),
    click.option(
        "--ftfy-normalizer",
        type=click.Choice(["NFC", "NFKC"]),
        default="NFC",
        show_default=True,
        help="With --ftfy: the Unicode normal form.",
    ),
    click.option("--wikitext-detokenize", is_flag=True, help="Undo WikiText's tokenisation."),
)


@command
@_options(*downloading(PILE))
@_building
@_packing
@click.option("--text-key", default="text", show_default=True, help="Of the lines' objects.")
def pile(output: Output, sources: tuple[Path, ...], text_key: str, **options: Any) -> dict:
    """Pack documents into records: a line or a row each, or a .txt file.

    SRC are files or folders of .jsonl, .txt (also .gz, .zst) and .parquet. Folders that hold
    parts called train, val and test become folders of these names in the output. With --download
    SRC is the folder that raw files are fetched to, and only the chosen parts of it are read.
    """
    from runner.data.making.sources import by_split

    _check(output, options)
    recipe = _text_recipe(options, key=text_key)
    found, fetched = _found(output, sources, PILE_FILES, PILE, recipe, options)
    return _build(output, by_split(found), recipe, **options) | fetched


@command
@_options(*downloading(SUMMARIES))
@_building
@click.option("--article-column", default="article", show_default=True)
@click.option("--summary-column", help="[default: abstract, highlights or summary]")
@click.option("--truncate-article", is_flag=True, help="Shorten articles of pairs too long.")
@click.option(
    "--compare-bytes",
    is_flag=True,
    help="Leave out abstracts of more bytes than their article, as the reference does, not of "
    "more tokens.",
)
@click.option(
    "--test-set", is_flag=True, help="Take every pair, and whole, as for files called test."
)
def summarization(
    output: Output,
    sources: tuple[Path, ...],
    article_column: str,
    summary_column: str | None,
    truncate_article: bool,
    compare_bytes: bool,
    test_set: bool,
    **options: Any,
) -> dict:
    """Make an example of each article and its summary.

    SRC are files or folders of .bin (of the reference), .jsonl (also .gz, .zst) and .parquet. A
    pair is left out, and counted, when a side is empty, when the abstract is longer than the
    article, or when it is too long. Test sets are taken whole, or refused. With --download SRC is
    the folder that raw files are fetched to, and only the chosen parts of it are read.
    """
    from runner.data.making.sources import by_split
    from runner.data.making.summarization import ABSTRACT, PairOptions, SummarizationRecipe

    _check(output, options)
    recipe = SummarizationRecipe(
        options=PairOptions(
            tokenizer=options.pop("tokenizer"),
            allow_special=options.pop("allow_special"),
            length=options.pop("max_sequence_length"),
            article=article_column,
            abstract=summary_column or ABSTRACT,
            truncate_article=truncate_article,
            compare_bytes=compare_bytes,
            test=test_set,
        )
    )
    found, fetched = _found(output, sources, PAIR_FILES, SUMMARIES, recipe, options)
    return _build(output, by_split(found), recipe, **options) | fetched


@command
@_building
@_packing
@click.option(
    "--glob",
    "patterns",
    multiple=True,
    default=["*"],
    show_default=True,
    help="Which files of folders to take; may be repeated.",
)
def text(
    output: Output, sources: tuple[Path, ...], patterns: tuple[str, ...], **options: Any
) -> dict:
    """Pack text or source files into records, one document each."""
    from runner.data.making.sources import Part, find_source_files

    _check(output, options)
    recipe = _text_recipe(options, whole_files=True)
    files = tuple(path for path, _ in find_source_files(_given(sources), patterns))
    return _build(output, [Part(files=files)], recipe, **options)


def _check(output: Output, options: Mapping[str, Any]) -> None:
    from runner.data.making.tokenizer import notes

    if options["resume"] and options["force"]:
        raise click.UsageError("--resume goes on, --force begins anew: give one of them")
    if options["compress"] and options["file_format"] == "hdf5":
        raise click.UsageError("--gzip is for TFRecords, expected it without --format hdf5")
    for note in notes(options["tokenizer"]):
        output.note(note)


def _given(sources: tuple[Path, ...]) -> tuple[Path, ...]:
    if not sources:
        raise click.UsageError("name what to read: files or folders")
    return sources


def _found(
    output: Output,
    sources: tuple[Path, ...],
    patterns: Sequence[str],
    published: Published,
    recipe: Recipe,
    options: dict[str, Any],
) -> tuple[list[tuple[Path, Path]], dict[str, Any]]:
    """What is read, fetched if that is asked for; and fields for the JSON object."""
    from gptj_convert.files.output_folder import refuse_existing, refuse_overlap
    from runner.data.making.sources import find_source_files

    download, repository = options.pop("download"), options.pop("repository")
    parts = options.pop("parts")
    if not download:
        if repository or parts:
            raise click.UsageError("--repository and --part say what --download fetches, give it")
        return find_source_files(_given(sources), patterns), {}
    # What would end the run after a long download ends it before.
    refuse_existing(options["out"], force=options["force"] or options["resume"])
    recipe.encoder("")()
    folder, data_set = published.named(sources, repository)
    refuse_overlap(options["out"], folder, [folder])
    found, fields = fetch_parts(output, data_set, folder, parts, patterns)
    return found, {"download": fields}


def _text_recipe(options: dict[str, Any], *, key: str = "text", whole_files: bool = False) -> Any:
    from runner.data.making.text import TextOptions, TextRecipe

    ftfy, form = options.pop("ftfy"), options.pop("ftfy_normalizer")
    return TextRecipe(
        options=TextOptions(
            tokenizer=options.pop("tokenizer"),
            allow_special=options.pop("allow_special"),
            key=key,
            ftfy=form if ftfy else None,
            wikitext_detokenize=options.pop("wikitext_detokenize"),
        ),
        length=options.pop("max_sequence_length"),
        whole_files=whole_files,
        short_seq_prob=options.pop("short_seq_prob"),
        seed=options.pop("seed"),
        keep_all=not options.pop("reference_remainder"),
    )


def _build(
    output: Output,
    parts: Sequence[Part],
    recipe: Recipe,
    *,
    out: Path,
    file_format: str,
    compress: bool,
    files_per_record: int,
    write_remainder: bool,
    processes: int | None,
    on_error: str,
    resume: bool,
    force: bool,
) -> dict[str, Any]:
    from gptj_convert.files.output_folder import refuse_overlap
    from runner.data.making.build import (
        BuildResult,
        Options,
        Packing,
        SkippedDocument,
        build,
        is_resumable,
    )
    from runner.data.making.encoding import check_processes, default_processes

    processes = processes or default_processes()
    check_processes(processes)
    for file in (f for part in parts for f in part.files):
        refuse_overlap(out, file, [file])
    options = Options(
        format=file_format,
        compress=compress,
        examples_per_file=files_per_record,
        write_remainder=write_remainder,
        skip_bad=on_error == "skip",
    )
    skipped = 0
    result: BuildResult | None = None
    events = build(parts, recipe, out, options, processes=processes, resume=resume, force=force)
    try:
        with progress(output, "packing") as report, closing(events):
            for event in events:
                if isinstance(event, Packing):
                    report(event.done, event.total, _rates(event))
                elif isinstance(event, SkippedDocument):
                    skipped += 1
                    if skipped <= _NAMED:
                        output.note(f"skipped: {event.problem}")
                else:
                    result = event
    except BaseException as e:
        if is_resumable(out):
            e.add_note("what is done is kept: the same command with --resume goes on")
        raise
    assert result, "the last event"
    if skipped > _NAMED:
        output.note(f"skipped: … and {skipped - _NAMED} more")
    if result.kept_files:
        output.note(f"{result.kept_files} record files were there already, and hold")
    for name, counts in result.counts.items():
        output.note(_summary(name, counts, recipe.length))
    output.data(str(out))
    return {"output": str(out), **_fields(result.counts.values())} | (
        {"parts": {name: _fields([c]) for name, c in result.counts.items()}}
        if any(result.counts)
        else {}
    )


def _rates(event: Any) -> str:
    seconds = max(event.seconds, 1e-3)
    return (
        f"{event.part + ': ' if event.part else ''}"
        f"{event.documents / seconds:,.0f} documents/s, {event.tokens / seconds:,.0f} tokens/s, "
        f"{event.bytes / seconds / 1e6:.1f} MB/s"
    )


def _summary(name: str, counts: Counts, length: int) -> str:
    left_out = "".join(f", {count:,} {rule}" for rule, count in sorted(counts.left_out.items()))
    return (
        f"{name + ': ' if name else ''}{counts.documents:,} documents ({counts.skipped} skipped"
        f"{left_out}), {counts.bytes / 1e6:.1f} MB → {counts.tokens:,} tokens in "
        f"{counts.examples:,} examples of {length}"
    )


def _fields(parts: Iterable[Counts]) -> dict[str, Any]:
    """Numbers of the parts added up, for the JSON object."""
    total: dict[str, Any] = {"left_out": {}}
    for counts in map(asdict, parts):
        for rule, count in counts.pop("left_out").items():
            total["left_out"][rule] = total["left_out"].get(rule, 0) + count
        counts.pop("places")
        for name, value in counts.items():
            total[name] = total.get(name, 0) + value
    return total


for _command in (pile, summarization, text, inspect):
    data.add_command(_command)
