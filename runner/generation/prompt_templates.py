"""Prompts rendered by a template, as the samples of training records are up to their completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from gptj_model.errors import UsageError
from runner.data.making.instruction.sample_tokens import SampleTokens
from runner.data.making.instruction.shapes import Sample, asked
from runner.data.making.instruction.stated_templates import StatedTemplates
from runner.data.making.instruction.templates import SPLIT, Renderer
from runner.data.making.long_line import Damaged
from runner.generation.prompts import Prompt


class PromptRenderer:
    """Renders prompts by the templates of some records.

    The ids of a prompt are those that precede the completion in such records. A token that holds
    the end of the prompt and the beginning of the completion belongs to the completion there.

    Args:
        stated: templates by the kind of what is asked.
        tokenizer: folder of the model's tokenizer.

    Attributes:
        ends: ids of tokens that end an answer: end-of-text, as after every sample, and the special
            token that a chat template writes after a turn of the assistant.

    Raises:
        FileFault: the tokenizer does not exist or cannot be read.
    """

    def __init__(self, stated: StatedTemplates, tokenizer: Path) -> None:
        self._tokens = SampleTokens(tokenizer, allow_special=stated.allow_special)
        date = datetime.fromisoformat(stated.date) if stated.date else None
        self._renderers: Mapping[str, Renderer] = {
            kind: Renderer(template, self._tokens.special, date)
            for kind, template in stated.templates.items()
        }
        self.ends = {self._tokens.end}

    def __call__(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts with their whole texts and ids.

        Raises:
            GptjError: a template does not take a prompt; with its place.
        """
        return [self._rendered(prompt) for prompt in prompts]

    def _rendered(self, prompt: Prompt) -> Prompt:
        record = {"prompt": prompt.text} if prompt.record is None else prompt.record
        try:
            sample = asked(record)
            renderer = self._renderer(sample, prompt)
            values = self._tokens.protected(sample.values)
            made = replace(sample, values=values)
            text = renderer.prompt(made)
            end = self._tokens.special_at(renderer.after_turn(made).lstrip())
        except Damaged as e:
            raise prompt.fault(f"{prompt.where}: {e}", hint=e.hint) from None
        if end is not None:
            self.ends.add(end)
        ((ids, _),) = self._tokens.encode([text])
        # Records put an end-of-text before a sample that begins with its completion.
        return replace(prompt, text=text.replace(SPLIT, ""), ids=ids or [self._tokens.end])

    def _renderer(self, sample: Sample, prompt: Prompt) -> Renderer:
        if found := self._renderers.get(sample.kind):
            return found
        if len(self._renderers) == 1:
            (found,) = self._renderers.values()
            return found
        raise UsageError(
            f"{prompt.where}: is a {sample.kind}, and the records hold "
            f"{' and '.join(sorted(self._renderers))} samples with templates of their own",
            hint="choose one with --template NAME, or give JSON lines with instruction or messages",
        )
