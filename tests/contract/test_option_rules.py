"""Every option of every mode is used or refused: none is ignored silently."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import click
import pytest

from runner import run as reference
from runner.cli.evaluation.harness import PREFIX, TaskType
from runner.cli.root import root
from runner.cli.shared.command import Command

#: What chooses each mode on a command line.
CHOOSES = {
    "a CS system (--cs-ip, --target)": ("--cs-ip", "10.0.0.1"),
    "a CS system (--cs_ip)": ("--cs_ip", "10.0.0.1", "--mode", "train"),
    "a comparison with the source": (),
}
#: What a command cannot do without.
REQUIRED = {
    "convert": ("--to", "tf"),
    "data instruct": ("--tokenizer", "t"),
    "data pile": ("--tokenizer", "t"),
    "data summarization": ("--tokenizer", "t"),
    "data text": ("--tokenizer", "t"),
    "golden record": ("model",),
    "inspect": ("path",),
    "data inspect": ("folder",),
    "runs": ("model_dir",),
    "run.py": ("--params", "p.yaml", "--mode", "train"),
}


def _commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            assert isinstance(command, Command), f"{name} has no examples and no rules"
            yield prefix + name, command


COMMANDS = dict(_commands(root)) | {"run.py": reference.run}


def _run(name: str, command: Command, *arguments: str) -> click.Context:
    return command.make_context(name, [*arguments])


def _value(option: click.Option) -> list[str]:
    """A value that the option takes."""
    if option.is_flag:
        return []
    if isinstance(option.type, TaskType):
        return [f"{PREFIX}piqa"]
    if isinstance(option.type, click.Choice):
        return [str(option.type.choices[0])]
    return ["KEY=1"] if option.multiple and "set" in option.opts[0] else ["1"]


def _refused() -> Iterator[tuple[str, str, str]]:
    for name, command in COMMANDS.items():
        for mode, taken in command.rules.takes.items():
            listed = {o for options in command.rules.takes.values() for o in options}
            yield from ((name, mode, option) for option in sorted(listed - set(taken)))


@pytest.mark.parametrize(("name", "mode", "option"), list(_refused()))
def test_an_option_of_another_mode_is_refused_with_its_modes(name: str, mode: str, option: str):
    command = COMMANDS[name]
    chosen = CHOOSES.get(mode, tuple(mode.split()))
    if mode != option and option in chosen:
        pytest.skip("it chooses the mode")
    parameter = next(p for p in command.params if option in (*p.opts, *p.secondary_opts))
    assert isinstance(parameter, click.Option)
    given = [*REQUIRED.get(name, ()), *chosen, option, *_value(parameter)]
    context = _run(name, command, *given)
    if command.rules.mode(context.params) != mode:
        pytest.skip("the option chooses another mode")
    with pytest.raises(Exception, match=option) as refused:
        command.rules.check(context)
    takers = [m for m, taken in command.rules.takes.items() if option in taken]
    assert all(taker in str(refused.value) for taker in takers)
    assert mode in str(refused.value)


@pytest.mark.parametrize("name", COMMANDS)
def test_rules_name_options_that_exist(name: str):
    command = COMMANDS[name]
    exist = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    assert command.rules.named <= exist


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_its_rules_accept(name: str):
    command = COMMANDS[name]
    assert 1 < len(command.examples) < 4
    program = ["gptj", *name.split()] if name != "run.py" else ["python", "-m", "runner.run"]
    for example in command.examples:
        words = shlex.split(example)
        assert words[: len(program)] == program
        command.rules.check(_run(name, command, *words[len(program) :]))


@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_exclude_each_other(name: str):
    command = COMMANDS[name]
    for group in command.rules.exclusive:
        options = {o: p for p in command.params for o in p.opts}
        both = [w for o in group[:2] for w in (o, *_value(options[o]))]
        needed = [*REQUIRED.get(name, ()), *both]
        with pytest.raises(Exception, match="exclude each other"):
            command.rules.check(_run(name, command, *needed))
