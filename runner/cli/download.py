"""`gptj download`: fetch a GPT-J from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.shared.command import command
from runner.cli.shared.fetching import DEFAULT_REPOSITORY, default_folder, fetch_to
from runner.cli.shared.options import out_option
from runner.cli.shared.output import Output

if TYPE_CHECKING:
    pass


@command("gptj download", "gptj download me/my-gpt-j@main --out my-gpt-j")
@click.argument("address", metavar="[REPO]", default=DEFAULT_REPOSITORY)
@click.option(
    "--revision",
    help="Branch, tag or commit to fetch; the branch float16 of GPT-J-6B is half the size.",
)
@out_option(default_text="the name of the repository")
def download(
    output: Output, address: str, revision: str | None, out: Path | None
) -> dict[str, Any]:
    """Fetch config, tokenizer and one set of weights (default: GPT-J-6B into ./gpt-j-6b).

    REPO is OWNER/NAME, OWNER/NAME@REVISION, or the address of the model's page on the hub. A file
    in the hub's cache on this machine is copied from there. An interrupted download resumes when
    the same command runs again.
    """
    from gptj_convert.hub.address import parse_address

    found = parse_address(address)
    if revision and found.revision and revision != found.revision:
        raise click.UsageError(
            f"{address!r} names the revision {found.revision!r}, --revision {revision!r}: "
            "give one of them"
        )
    out = out or default_folder(found.repository)
    fields = fetch_to(output, found.repository, revision or found.revision, out)
    output.data(str(out))
    return fields
