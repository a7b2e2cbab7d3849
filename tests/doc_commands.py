"""The blocks of commands that README and docs show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(
    r"^\s*(?:\w+=\S+ |exec )*(gptj|python|pip|make|srun|cszoo|csrun_wse) ", re.MULTILINE
)
#: A visible line of a block that no test runs: what it takes.
_NEEDS = re.compile(r"^# needs: (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """Commands that a page shows together."""

    page: Path
    line: int
    text: str

    @property
    def needs(self) -> str | None:
        """Requirements of the commands; None if a test runs them."""
        found = _NEEDS.search(self.text)
        return found and found[1]

    @property
    def programs(self) -> set[str]:
        """Programs that the lines call."""
        return set(_COMMAND.findall(self.text))


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order, without program output (`$ …`) and other languages."""
    text = page.read_text(encoding="utf-8")
    for fence in _FENCE.finditer(text):
        if _COMMAND.search(fence[1]) and not fence[1].startswith("$ "):
            yield Block(page, text.count("\n", 0, fence.start()) + 1, fence[1])
