"""`gptj inspect`: what a checkpoint holds, whether it is intact, how it differs from another."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from gptj_model.errors import UsageError
from runner.cli.shared.command import command
from runner.cli.shared.errors import Exit
from runner.cli.shared.option_rules import OptionRules
from runner.cli.shared.options import CHECKPOINT, PATH, config_option
from runner.cli.shared.output import Output, one_line
from runner.cli.shared.progress import follow

if TYPE_CHECKING:
    from gptj_convert.checkpoint.match import Finding
    from gptj_convert.inspection.diff import TensorComparison
    from gptj_convert.inspection.inspect import Inspection, Statistics
    from gptj_convert.inspection.signature import Signer
    from gptj_model.errors import FileFault

#: Largest number of problems printed, and of characters of a tensor's name; --json has all.
_SHOWN = 20
_NAME = 72

RULES = OptionRules(
    needs={
        "--public-key": "--check",
        "--identity": "--check",
        "--identity-provider": "--identity",
    },
    exclusive=(("--public-key", "--identity"),),
)


@command(
    "gptj inspect gpt-j-6b --stats",
    "gptj inspect converted/ --check --public-key me.pub",
    "gptj inspect converted/ --diff gpt-j-6b",
    rules=RULES,
)
@click.argument("path", type=CHECKPOINT)
@click.option(
    "--stats",
    is_flag=True,
    help="Read every tensor, and add min, max, mean, standard deviation and the counts of NaN, "
    "infinite and zero values.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Compare the files with the hashes and checksums recorded beside them.",
)
@click.option(
    "--public-key",
    type=PATH,
    help="Public key, or root certificates, of who must have signed model.sig, as a PEM file.",
)
@click.option(
    "--identity",
    metavar="NAME",
    help="Identity, such as an e-mail address, that must have signed model.sig through sigstore; "
    "needs the network.",
)
@click.option(
    "--identity-provider",
    metavar="URL",
    help="OpenID provider that vouches for the identity, such as https://accounts.google.com.",
)
@click.option(
    "--diff",
    "other",
    metavar="OTHER",
    type=CHECKPOINT,
    help="Compare the values with another checkpoint.",
)
@config_option
def inspect(
    output: Output,
    path: Path,
    stats: bool,
    check: bool,
    public_key: Path | None,
    identity: str | None,
    identity_provider: str | None,
    other: Path | None,
    config_file: Path | None,
) -> dict[str, Any]:
    """List every tensor of a checkpoint with its names in other formats, from the headers alone.

    PATH is a folder, a weight file of any format, or the prefix of a TensorFlow checkpoint. A
    missing or unknown tensor, or one of another shape, is marked, and is not an error.

    With --check or --diff only their findings are printed. The exit code is 3 if a file differs
    from what its manifest.json, download record, model.sig, TensorFlow index or .bin archive
    states, if model.sig is not signed by whom it should be, or if OTHER differs by more than the
    rounding to a narrower dtype.

    Statistics cover the finite values. In --json a statistic without values is null, and values
    that are not finite are "nan", "inf" or "-inf".
    """
    from gptj_convert.inspection.inspect import gather_statistics
    from gptj_convert.inspection.inspect import inspect as run
    from gptj_model.errors import FileFault

    signer = _signer(public_key, identity, identity_provider)
    try:
        opened = run(path, config_file=config_file)
    except FileFault as e:
        if not check or other:
            raise
        nothing = {"path": str(path), "format": None, "files": [], "config": None, "tensors": []}
        return {
            **nothing,
            "problems": [e.message],
            "hint": e.hint,
            **_check(output, path, e, signer),
        }
    with opened:
        statistics: dict[str, Statistics] = {}
        if stats:
            statistics = follow(output, "reading", gather_statistics(opened))
        if stats or not (check or other):
            _show(output, opened, statistics)
        fields = {**opened.to_json(statistics), "exit": Exit.OK}
        if check:
            fields |= _check(output, path, opened, signer)
        if other:
            compared = _compare(output, opened, other, config_file)
            fields |= compared | {"exit": max(fields["exit"], compared["exit"])}
    return fields


def _show(output: Output, opened: Inspection, statistics: dict[str, Statistics]) -> None:
    """Print a table for each role, then totals, config and problems."""
    from gptj_convert.checkpoint.match import Role

    for role in Role:
        findings = [f for f in opened.findings if f.role is role]
        if findings and role is not Role.WEIGHT:
            output.data(f"\n{role.value} ({len(findings)}):")
        for line in _table(opened, findings, statistics):
            output.data(line)
    totals, config = opened.totals(), opened.config
    dtypes = ", ".join(f"{d['tensors']} {name}" for name, d in totals["dtypes"].items())
    output.data(
        f"\n{opened.scheme.value}: {totals['tensors']} tensors ({dtypes}), "
        f"{totals['parameters']:,} parameters, {_size(totals['bytes'])}"
    )
    if config:
        tied = "tied to the embedding" if config.tie_word_embeddings else "not tied"
        output.data(
            f"config: {config.n_layer} layers, hidden {config.n_embd}, {config.n_head} heads, "
            f"vocabulary {config.vocab_size}, head {tied}"
        )
    for problem in opened.problems[:_SHOWN]:
        output.data(f"problem: {one_line(problem)}")
    if len(opened.problems) > _SHOWN:
        output.data(f"… and {len(opened.problems) - _SHOWN} more problems")
    if opened.hint:
        output.note(f"hint: {opened.hint}")


def _table(
    opened: Inspection, findings: Sequence[Finding], statistics: dict[str, Statistics]
) -> Iterator[str]:
    """Yield aligned lines: what the file holds, then other names and statistics.

    On a terminal that is too narrow for both, the second part follows on a line of its own. A pipe
    has no width, so every tensor takes one line there.
    """
    if not findings:
        return
    held: list[tuple[str, ...]] = [("name", "shape", "dtype", "bytes", "block")]
    more: list[tuple[str, ...]] = [("other names", "values", "")]
    for f in findings:
        kind = ("missing", "", "")
        if f.info:
            kind = (str(list(f.info.shape)), f.info.dtype, _size(f.info.nbytes))
        block = f.tensor.block if f.tensor else None
        name = opened.name_in_file(f)
        held.append((one_line(name, _NAME), *kind, "" if block is None else str(block)))
        others = [n for n in (f.tensor.hf, f.tensor.tf) if n != name] if f.tensor else []
        figures = _figures(statistics[f.name]) if f.info and f.name in statistics else ""
        more.append(("  ".join(others), figures, "PROBLEM" if f.problem and f.tensor else ""))
    wide = _aligned([a + b for a, b in zip(held, more, strict=True)], "<<<>><<<")
    longest = max(map(len, wide))
    if shutil.get_terminal_size((longest, 0)).columns >= longest:
        yield from wide
        return
    more[0] = ()
    for line, below in zip(_aligned(held, "<<<>>"), more, strict=True):
        yield "\n    ".join((line, *filter(None, below)))


def _aligned(rows: Sequence[tuple[str, ...]], sides: str) -> list[str]:
    """Return rows as aligned lines; the first row holds headings, and empty columns are dropped.

    Args:
        rows: rows with one cell per column.
        sides: for each column, "<" to align it left or ">" to align it right.
    """
    columns = []
    for side, column in zip(sides, zip(*rows, strict=True), strict=True):
        if any(column[1:]):
            width = max(map(len, column))
            columns.append([f"{cell:{side}{width}}" for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _figures(s: Statistics) -> str:
    named = {"min": s.minimum, "max": s.maximum, "mean": s.mean, "std": s.std}
    shown = (f"{k} {'none' if v is None else f'{v:.3g}':<9}" for k, v in named.items())
    return f"{' '.join(shown)} NaN {s.nan}  inf {s.infinite}  zero {s.zero}"


def _size(count: int) -> str:
    """Return a number of bytes in three figures."""
    size, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}"


def _signer(key: Path | None, identity: str | None, provider: str | None) -> Signer | None:
    """Return who must have signed a model, if the command line says so."""
    from gptj_convert.inspection.signature import Signer

    if identity and not provider:
        raise UsageError(
            "--identity has no effect without --identity-provider",
            hint="add the provider, such as --identity-provider https://accounts.google.com",
        )
    return Signer(key, identity, provider) if key or identity else None


def _check(
    output: Output, path: Path, opened: Inspection | FileFault, signer: Signer | None
) -> dict[str, Any]:
    from gptj_convert.inspection.integrity import check
    from gptj_convert.inspection.signature import SIGNATURE_FILE

    result = follow(output, "checking", check(path, opened, signer))
    for stated_by, counts in result.checked.items():
        compared = ", ".join(f"{n} {kinds}" for kinds, n in counts.items() if n)
        output.data(f"compared with {stated_by}: {compared}")
    if result.signer:
        output.data(f"signed by {one_line(result.signer)}")
    if result.unknown_signer:
        output.data(
            f"note: who signed {SIGNATURE_FILE} was not checked: give --public-key FILE, or "
            "--identity NAME with --identity-provider URL"
        )
    for name in result.extra:
        output.data(f"note: {one_line(name)} also exists, and no hash of it is recorded")
    for m in result.mismatches:
        output.data(f"DIFFERS: {m.kind} {one_line(m.name)}")
        output.data(f"  found:    {one_line(m.found)}")
        output.data(f"  expected: {one_line(m.expected)}, by {m.stated_by}")
    differing = len(result.mismatches)
    output.data(f"DAMAGED: {differing} problem{'s' * (differing != 1)}" if differing else "WHOLE")
    return {"check": result.to_json(), "exit": Exit.MISMATCH if differing else Exit.OK}


def _compare(
    output: Output, opened: Inspection, other: Path, config_file: Path | None
) -> dict[str, Any]:
    from gptj_convert.inspection.diff import Outcome, compare
    from gptj_convert.inspection.inspect import inspect as run

    theirs = run(other)
    if theirs.config is None and config_file:
        theirs.source.close()
        theirs = run(other, config_file=config_file)
    with theirs:
        result = follow(output, "comparing", compare(opened, theirs))
    for name, (ours, others) in result.config.items():
        output.data(f"config: {name} is {ours!r} in PATH, {others!r} in OTHER")
    for t in result.tensors:
        if t.outcome is Outcome.DIFFERENT:
            output.data(_difference(t))
    alike = Counter((t.outcome, t.dtypes, t.rounded) for t in result.tensors)
    for (outcome, (ours, others), rounded), count in alike.items():
        tensors = f"{count} tensor{'s' * (count != 1)}"
        if outcome is Outcome.ROUNDED:
            wide, narrow = (others, ours) if rounded == "path" else (ours, others)
            side = "PATH" if rounded == "path" else "OTHER"
            output.data(f"{tensors}: {narrow} in {side}, rounded from the other's {wide}")
        elif outcome is Outcome.EQUAL and ours != others:
            output.data(f"{tensors}: {ours} in PATH, {others} in OTHER, the same values")
        elif outcome is Outcome.EQUAL:
            output.data(f"{tensors}: the same values except for signs of zeros or kinds of NaN")
    for outcome, count in result.counts().items():
        if count:
            output.data(f"{outcome}: {count} tensors")
    output.data(result.outcome.value.upper())
    different = result.outcome is Outcome.DIFFERENT
    return {
        "other": str(other),
        "differences": result.to_json(),
        "exit": Exit.MISMATCH if different else Exit.OK,
    }


def _difference(t: TensorComparison) -> str:
    """Return one line that says how a tensor differs."""
    name = one_line(t.name)
    for side, dtype in zip(("PATH", "OTHER"), t.dtypes, strict=True):
        if dtype is None:
            return f"{name}: not in {side}"
    if t.first is None or t.first_values is None:
        return f"{name}: {list(t.shapes[0] or ())} in PATH, {list(t.shapes[1] or ())} in OTHER"
    size = "" if t.max_abs is None else f", by up to {t.max_abs:.3g}"
    if t.relative is not None:
        size += f" ({t.relative:.3g} of the standard deviation)"
    if t.nonfinite:
        size += f", {t.nonfinite} of them NaN or infinite"
    ours, others = (v if isinstance(v, str) else f"{v:.9g}" for v in t.first_values)
    return (
        f"{name}: {t.differing} of {t.values} values differ{size}; "
        f"first at {t.first}: {ours} in PATH, {others} in OTHER"
    )
