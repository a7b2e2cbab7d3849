"""Records built as a command line asks: fetched sources, progress, and a summary at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from gptj_model.errors import UsageError
from runner.cli.data.download import Published, fetch_parts
from runner.cli.data.remote_output import complete_upload, refuse_sources, upload_of
from runner.cli.data.shard import Share, find_shard
from runner.cli.shared.output import Output
from runner.cli.shared.progress import follow

if TYPE_CHECKING:
    from runner.data.making.build import BuildResult, Counts, Options, Recipe
    from runner.data.making.shards import Shard
    from runner.data.making.sources import Part
    from runner.data.remote.upload import Upload

#: Largest number of skipped documents that are named one by one.
_NAMED = 20


def named_sources(sources: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the sources of a command line, of which there must be at least one."""
    if not sources:
        raise click.UsageError("nothing to read: name files or folders")
    return sources


def find_or_fetch(
    output: Output,
    sources: tuple[Path, ...],
    patterns: Sequence[str],
    published: Published,
    recipe: Recipe,
    options: dict[str, Any],
) -> tuple[list[tuple[Path, Path]], dict[str, Any]]:
    """Return the files to read, fetched if --download is given, and fields of the JSON object.

    Removes the options that concern the download from `options`.
    """
    from gptj_convert.files.output_folder import refuse_existing, refuse_overlap
    from runner.data.making.sources import find_source_files
    from runner.data.remote.path import as_remote

    download, repository = options.pop("download"), options.pop("repository")
    parts = options.pop("parts")
    if not download:
        return find_source_files(named_sources(sources), patterns), {}
    if shard := find_shard(options["share"]):
        raise UsageError(
            f"--download fetches the whole data set, and this is shard {shard.index} of "
            f"{shard.count} (from {shard.origin})",
            hint="fetch it once, as with `hf download --repo-type dataset`, and name its folder",
        )
    folder, data_set = published.named(sources, repository)
    if as_remote(folder):
        raise click.UsageError(f"--download fetches into a folder of this machine, found {folder}")
    # Fail before a long download rather than after it.
    if not as_remote(options["out"]):
        refuse_existing(options["out"], force=options["force"] or options["resume"])
        refuse_overlap(options["out"], folder, [folder])
    recipe.encoder("")()
    found, fields = fetch_parts(output, data_set, folder, parts, patterns)
    return found, {"download": fields}


def build_records(
    output: Output,
    sources: Sequence[Path],
    found: Sequence[tuple[Path, Path]],
    parts: Sequence[Part],
    recipe: Recipe,
    *,
    out: Path,
    staging: Path | None,
    file_format: str,
    compress: bool,
    files_per_record: int,
    write_remainder: bool,
    processes: int | None,
    on_error: str,
    share: Share | None,
    resume: bool,
    force: bool,
) -> dict[str, Any]:
    """Build the records of every part, or a shard of them, and return the fields of the JSON
    object.

    The options are those of `runner.cli.data.options`; `found` is what `find_source_files` returns
    for `sources`.
    """
    from runner.data.making.build import Options
    from runner.data.making.encoding import check_processes

    if processes:
        check_processes(processes)
    facts = None
    if shard := find_shard(share):
        out, parts, facts = _take_shard(output, shard, sources, found, parts, recipe, out)
    files = [f for part in parts for f in part.files]
    upload = upload_of(out, staging, files, resume=resume, force=force)
    here = upload.folder if upload else out
    refuse_sources(here, out, files)
    _note_compression(output, files)
    options = Options(
        format=file_format,
        compress=compress,
        examples_per_file=files_per_record,
        write_remainder=write_remainder,
        skip_bad=on_error == "skip",
    )
    how = {"processes": processes, "resume": resume, "force": force}
    result = _build(output, parts, recipe, here, options, upload, facts, **how)
    _report(output, result, recipe.length)
    output.data(str(out))
    return {
        "output": str(out),
        **count_fields(result.counts),
        **({"shard": {key: facts[key] for key in ("index", "count", "from")}} if facts else {}),
    }


def _build(
    output: Output,
    parts: Sequence[Part],
    recipe: Recipe,
    here: Path,
    options: Options,
    upload: Upload | None,
    shard: dict[str, Any] | None,
    **how: Any,
) -> BuildResult:
    """Build the records in a folder of this machine, and upload them if they belong elsewhere."""
    from runner.data.making.build import build, is_resumable

    if upload and how["resume"]:
        found = complete_upload(upload, parts, recipe, options, shard)
        if found is not None:
            return found
    work = build(parts, recipe, here, options, shard=shard, **how)
    result = follow(output, "packing", work, resumable=lambda: is_resumable(here))
    if upload:
        follow(output, "uploading", upload.run(), resumable=lambda: True)
    return result


def _take_shard(
    output: Output,
    shard: Shard,
    sources: Sequence[Path],
    found: Sequence[tuple[Path, Path]],
    parts: Sequence[Part],
    recipe: Recipe,
    out: Path,
) -> tuple[Path, list[Part], dict[str, Any]]:
    """Return the folder, the sources and the facts of a shard."""
    from gptj_convert.files.output_folder import refuse_overlap
    from runner.data.making.shards import facts, parts_of, refuse_other_content
    from runner.data.remote.path import as_remote

    if not as_remote(out):
        refuse_other_content(out, shard)
        # What one machine writes into a source, another would find there.
        for source in sources:
            if not as_remote(source):
                refuse_overlap(out, source, [])
    if shard.origin != "--shard":
        output.note(
            f"note: shard {shard.index} of {shard.count}, from {shard.origin}; --shard 0/1 makes "
            "all records in one run"
        )
    mine = parts_of(parts, shard, whole_files=recipe.reading(out).whole_files)
    return out / shard.folder, mine, facts(parts, dict(found), shard)


def _report(output: Output, result: BuildResult, length: int) -> None:
    """Note what was read and made."""
    if result.kept_files:
        output.note(f"reused {result.kept_files} record files of the interrupted run")
    for name, counts in result.counts.items():
        _note_skipped(output, counts)
        if not counts.examples:
            output.note(
                f"note: {name + ': ' if name else ''}this shard has no example; `gptj data merge` "
                "expects its folder all the same"
            )
        output.note(_summary(name, counts, length))
        for shape, number in counts.shapes.items():
            output.note(f"{name + ': ' if name else ''}{number:,} documents of the shape {shape}")
        if counts.special_names:
            output.note(
                f"note: {name + ': ' if name else ''}the texts hold {counts.special_names:,} names "
                f"of special tokens, such as <|endoftext|>, which are read as text; "
                "--allow-special reads them as tokens"
            )


def _note_compression(output: Output, files: Sequence[Path]) -> None:
    """Note which files are compressed in another way than their names say."""
    from runner.data.making.sources import misnamed_files

    notes = misnamed_files(files)
    for note in notes[:_NAMED]:
        output.note(f"note: {note}")
    if len(notes) > _NAMED:
        output.note(f"note: … and {len(notes) - _NAMED} more files with such names")


def _note_skipped(output: Output, counts: Counts) -> None:
    """Note the first of the malformed documents that were skipped."""
    shown = counts.places[:_NAMED]
    for place in shown:
        output.note(f"skipped: {place}")
    if counts.skipped > len(shown):
        output.note(f"skipped: … and {counts.skipped - len(shown)} more")


def _summary(name: str, counts: Counts, length: int) -> str:
    left_out = "".join(f", {count:,} {rule}" for rule, count in sorted(counts.left_out.items()))
    left_out += f", {counts.cut:,} cut" if counts.cut else ""
    return (
        f"{name + ': ' if name else ''}{counts.documents:,} documents ({counts.skipped} skipped"
        f"{left_out}), {counts.bytes / 1e6:.1f} MB → {counts.tokens:,} tokens in "
        f"{counts.examples:,} examples of {length}"
    )


def count_fields(counts: Mapping[str, Counts]) -> dict[str, Any]:
    """Return the counts of all parts added up, and of each part, for the JSON object.

    Args:
        counts: counts of each part by its folder; "" is a set without parts.
    """
    from runner.data.making.build import add_up

    def fields(parts: Iterable[Counts]) -> dict[str, Any]:
        values = asdict(add_up(parts))
        del values["places"]
        return values

    total = fields(counts.values())
    by_part = {name: fields([part]) for name, part in counts.items()}
    return total | ({"parts": by_part} if any(counts) else {})
