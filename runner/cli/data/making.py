"""`gptj data`: make training records from text, and inspect them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from runner.cli.data.building import build_records, find_or_fetch, named_sources
from runner.cli.data.download import PILE, SUMMARIES, downloading_options
from runner.cli.data.inspect import inspect
from runner.cli.data.instruct import instruct
from runner.cli.data.merge import merge
from runner.cli.data.options import building_options, packing_options, rules
from runner.cli.shared.command import command
from runner.cli.shared.output import Output
from runner.cli.shared.tokenizer_notes import note_tokenizer
from runner.data.making.file_patterns import PAIR_FILES, PILE_FILES


@click.group()
def data() -> None:
    """Make training records from text, and inspect them."""


@command(
    "gptj data pile pile/ --tokenizer gpt-j-6b",
    "gptj data pile --download --part val --tokenizer gpt-j-6b --out data",
    rules=rules(packing=True, downloading=True),
)
@downloading_options(PILE)
@building_options
@packing_options
@click.option(
    "--text-key",
    default="text",
    show_default=True,
    help="Key of the text in each object, or column of a table.",
)
def pile(output: Output, sources: tuple[Path, ...], text_key: str, **options: Any) -> dict:
    """Pack documents into records; a document is an object, a row or a whole .txt file.

    SRC are files or folders of .jsonl, .json, .csv, .tsv, .txt (also compressed), .parquet and
    .arrow. Parts called train, val and test become folders of these names in the output. With
    --download, SRC is the folder that raw files are fetched into, and only the chosen parts of it
    are read.
    """
    from runner.data.making.sources import by_split

    note_tokenizer(output, options["tokenizer"])
    recipe = _text_recipe(options, key=text_key)
    found, fetched = find_or_fetch(output, sources, PILE_FILES, PILE, recipe, options)
    return build_records(output, sources, found, by_split(found), recipe, **options) | fetched


@command(
    "gptj data summarization train.jsonl --tokenizer gpt-j-6b",
    "gptj data summarization --download --part train --tokenizer gpt-j-6b --truncate-article",
    rules=rules(
        packing=False,
        downloading=True,
        exclusive=(("--compare-bytes", "--allow-longer-abstracts"),),
    ),
)
@downloading_options(SUMMARIES)
@building_options
@click.option(
    "--article-column",
    default="article",
    show_default=True,
    help="Key or column that holds the article.",
)
@click.option(
    "--summary-column",
    help="Key or column that holds the summary.  [default: abstract, highlights or summary]",
)
@click.option(
    "--truncate-article",
    is_flag=True,
    help="Shorten the article of a pair that is too long, instead of leaving the pair out.",
)
@click.option(
    "--compare-bytes",
    is_flag=True,
    help="Leave out a pair whose abstract has more bytes than its article, as the reference does, "
    "instead of more tokens.",
)
@click.option(
    "--allow-longer-abstracts",
    is_flag=True,
    help="Keep a pair whose abstract is longer than its article, instead of leaving the pair out.",
)
@click.option(
    "--test-set",
    is_flag=True,
    help="Take every pair unshortened, as is always done with files called test.",
)
def summarization(
    output: Output,
    sources: tuple[Path, ...],
    article_column: str,
    summary_column: str | None,
    truncate_article: bool,
    compare_bytes: bool,
    allow_longer_abstracts: bool,
    test_set: bool,
    **options: Any,
) -> dict:
    """Make one example of each article with its summary.

    SRC are files or folders of .bin (the reference's), .jsonl, .json, .csv, .tsv (also
    compressed), .parquet and .arrow. A pair is left out, and counted, if a side is empty, if the
    abstract is longer than the article, or if the pair is too long. Test sets are taken whole or
    refused. With --download, SRC is the folder that raw files are fetched into, and only the
    chosen parts of it are read.
    """
    from runner.data.making.sources import by_split
    from runner.data.making.summarization import ABSTRACT, PairOptions, SummarizationRecipe

    note_tokenizer(output, options["tokenizer"])
    recipe = SummarizationRecipe(
        options=PairOptions(
            tokenizer=options.pop("tokenizer"),
            allow_special=options.pop("allow_special"),
            length=options.pop("max_sequence_length"),
            article=article_column,
            abstract=summary_column or ABSTRACT,
            truncate_article=truncate_article,
            compare_bytes=compare_bytes,
            allow_longer=allow_longer_abstracts,
            test=test_set,
        )
    )
    found, fetched = find_or_fetch(output, sources, PAIR_FILES, SUMMARIES, recipe, options)
    return build_records(output, sources, found, by_split(found), recipe, **options) | fetched


@command(
    "gptj data text book.txt --tokenizer gpt-j-6b",
    "gptj data text src/ --glob '*.py' --tokenizer gpt-j-6b --out code",
    rules=rules(packing=True, downloading=False),
)
@building_options
@packing_options
@click.option(
    "--glob",
    "patterns",
    multiple=True,
    default=["*"],
    show_default=True,
    help="Pattern of the files to read in a folder; can be given several times.",
)
def text(
    output: Output, sources: tuple[Path, ...], patterns: tuple[str, ...], **options: Any
) -> dict:
    """Pack text or source files into records, each file as one document."""
    from runner.data.making.sources import Part, find_source_files

    note_tokenizer(output, options["tokenizer"])
    recipe = _text_recipe(options, whole_files=True)
    found = find_source_files(named_sources(sources), patterns)
    part = Part(files=tuple(path for path, _ in found))
    return build_records(output, sources, found, [part], recipe, **options)


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


for _command in (pile, summarization, text, instruct, merge, inspect):
    data.add_command(_command)
