"""`make mutation`: run a sample of mutants of each module in pyproject.toml, and list survivors.

mutmut changes one expression at a time and runs the unit tests that reach it. It makes more
mutants than anyone waits for, so this program takes a sample of each module, evenly spaced in line
order. As a pytest plugin this file makes each test run short and deterministic.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from pathlib import Path

import hypothesis

#: Mutants of a module that are run, at most.
SAMPLE = 60


def pytest_configure() -> None:
    """Use few examples, always the same ones, and do not shrink a failure."""
    hypothesis.settings.register_profile(
        "mutation",
        max_examples=15,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    )
    hypothesis.settings.load_profile("mutation")


def pytest_collection_finish() -> None:
    """Freeze imported objects: every mutant is a fork of this process, and collects garbage."""
    gc.freeze()


def sample(module: Path) -> list[str]:
    """Return the names of a module's mutants that are run."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    names = mutate_file_contents(str(module), module.read_text(encoding="utf-8")).mutant_names
    step = max(1, len(names) / SAMPLE)
    taken = [names[int(n * step)] for n in range(min(SAMPLE, len(names)))]
    return [f"{'.'.join(module.with_suffix('').parts)}.{name}" for name in taken]


def main() -> None:
    """Run the sample; print one line per module, then every survivor."""
    from mutmut.configuration import config

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="paths; default all that pyproject.toml names")
    modules = [Path(m) for m in parser.parse_args().modules or config().only_mutate]
    samples = {module: sample(module) for module in modules}
    wanted = [name for names in samples.values() for name in names]
    mutmut = [Path(sys.executable).with_name("mutmut")]
    subprocess.run([*mutmut, "run", "--max-children", "1", *wanted], check=True)
    shown = subprocess.run([*mutmut, "results", "--all", "true"], capture_output=True, text=True)
    states = dict(line.strip().split(": ") for line in shown.stdout.splitlines() if ": " in line)
    for module, names in samples.items():
        killed = sum(states[name] in ("killed", "timeout") for name in names)
        print(f"{module}: {len(names)} mutants, {killed} killed, {killed / len(names):.0%}")
    for name in wanted:
        if states[name] not in ("killed", "timeout"):
            print(f"{states[name]}: {name}")


if __name__ == "__main__":
    main()
