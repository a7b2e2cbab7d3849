"""One side of a comparison in a process of its own, which answers each line with a line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


class Side:
    """A Python program that is started now, and computes only when it is asked.

    Args:
        arguments: the program's path, and what it is given.
    """

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line: str = "") -> Any:
        """Send a line and return the answer from JSON; exit if the other program has ended."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(answer)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
