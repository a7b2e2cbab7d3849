"""Which options of a command go together, as one table per command.

An option that the chosen mode does not take is refused with the modes that take it: no option is
dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
from click.core import ParameterSource

from gptj_model.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionRules:
    """Rules for which options of a command go together.

    Options are named as they are written, such as "--batch-size". One that no mode lists goes with
    every mode.
    """

    mode: Callable[[Mapping[str, Any]], str] = lambda values: ""
    """Return the mode that the values of all parameters choose: a key of `takes`."""
    takes: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    """Options that each mode takes, beside those that every mode takes. A mode is named by the
    options that choose it, such as "--task text"."""
    needs: Mapping[str, str] = field(default_factory=dict[str, str])
    """Option → the option without which it has no effect."""
    exclusive: Sequence[Sequence[str]] = ()
    """Groups of options of which one at most may be given."""

    @property
    def listed(self) -> set[str]:
        """Every option that some mode lists."""
        return {option for options in self.takes.values() for option in options}

    @property
    def named(self) -> set[str]:
        """Every option that a rule names."""
        return (
            self.listed
            | {*self.needs, *self.needs.values()}
            | {o for g in self.exclusive for o in g}
        )

    def check(self, context: click.Context) -> None:
        """Check the options that were given on the command line.

        Raises:
            UsageError: two of them exclude each other, or one has no effect beside the others.
        """
        given = list(_given(context))
        for group in self.exclusive:
            both = [option for option in given if option in group]
            if len(both) > 1:
                raise UsageError(
                    f"{' and '.join(both)} exclude each other", hint=f"leave out {both[-1]}"
                )
        mode = self.mode(context.params)
        listed = self.listed
        for option in given:
            if option in listed and option not in self.takes[mode]:
                takers = " or ".join(name for name, own in self.takes.items() if option in own)
                raise UsageError(
                    f"{option} goes with {takers}, and this is {mode}", hint=f"leave out {option}"
                )
            needed = self.needs.get(option)
            if needed and needed not in given:
                raise UsageError(
                    f"{option} has no effect without {needed}",
                    hint=f"give {needed} as well, or leave out {option}",
                )


def _given(context: click.Context) -> Iterator[str]:
    """Yield the options that the command line gives, by their first name."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if isinstance(parameter, click.Option) and source is ParameterSource.COMMANDLINE:
            yield parameter.opts[0]
