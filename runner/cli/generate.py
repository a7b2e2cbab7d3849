"""`gptj generate`: continue one prompt, or the prompts of a file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from gptj_convert.options import DTYPES
from runner.cli.shared.command import command
from runner.cli.shared.errors import Terminated
from runner.cli.shared.memory_budget import Load, MemoryBudget, execution_within, memory_option
from runner.cli.shared.model_choice import default_model, stated_execution
from runner.cli.shared.option_rules import OptionRules
from runner.cli.shared.options import (
    COUNT,
    COUNT_OR_ZERO,
    PATH,
    backend_option,
    execution_option,
    model_option,
    options,
)
from runner.cli.shared.output import Output
from runner.cli.shared.tokenizer_notes import note_tokenizer
from runner.config.execution import Execution

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gptj_convert.checkpoint.open import Checkpoint
    from gptj_convert.settings.generation_settings import GenerationDefaults
    from gptj_model.decoding.generation import Generator
    from gptj_model.decoding.options import GenerationOptions
    from gptj_model.decoding.search import Continuation
    from gptj_model.streaming.residency import Residency
    from runner.generation.choices import Choices
    from runner.generation.prompts import Begun, Prompt

RULES = OptionRules(
    needs={"--batch-size": "--prompts"},
    exclusive=(
        ("--prompt", "--ids", "--prompts"),
        ("--ids", "--template", "--chat"),
    ),
)

#: Options that are named as in transformers; what is not given is as the model's folder says.
choice_options = options(
    click.option(
        "--max-new-tokens",
        type=COUNT,
        help="Largest number of tokens to add to a prompt.  [default: 32]",
    ),
    click.option(
        "--min-new-tokens",
        type=COUNT_OR_ZERO,
        help="Number of new tokens before which no end-of-text is chosen.  [default: 0]",
    ),
    click.option(
        "--stop",
        "stop_strings",
        multiple=True,
        metavar="TEXT",
        help="Text that ends a continuation, which keeps the tokens that complete it; can be given "
        "several times.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        help="Divisor of the logits before sampling; 0 takes the most likely token.  [default: 0]",
    ),
    click.option(
        "--top-k",
        type=COUNT_OR_ZERO,
        help="Sample from the K most likely tokens; 0 means all.  [default: 0]",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(min=0, max=1, min_open=True),
        help="Sample from the most likely tokens whose probabilities add up to P.  [default: 1]",
    ),
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(min=0, min_open=True),
        help="Factor that makes tokens already in the text less likely, if above 1.  [default: 1]",
    ),
    click.option(
        "--no-repeat-ngram-size",
        type=COUNT_OR_ZERO,
        help="Number of successive tokens that are never repeated together; 0 means none.  "
        "[default: 0]",
    ),
    click.option(
        "--num-beams",
        type=COUNT,
        help="Number of beams of the search for the most probable text; 1 means no search.  "
        "[default: 1]",
    ),
    click.option(
        "--length-penalty",
        type=float,
        help="Power of its length that the log-probability of a beam is divided by; above 0 "
        "favors long texts.  [default: 1]",
    ),
    click.option(
        "--early-stopping",
        type=click.Choice(["false", "true", "never"]),
        callback=lambda context, option, value: {"false": False, "true": True}.get(value, value),
        help="End of a beam search, once as many texts as beams have ended: at once (true), when "
        "none is likely to become better (false), or when none can (never).  [default: false]",
    ),
    click.option(
        "--num-return-sequences",
        type=COUNT,
        help="Number of continuations of each prompt: samples, or the best beams.  [default: 1]",
    ),
)


@command(
    "gptj generate --prompt 'The quick brown fox'",
    "gptj generate --ids 464,3290 --num-beams 4 --num-return-sequences 2 --json",
    "gptj generate --prompts prompts.jsonl --temperature 0.8 --top-p 0.9 --seed 1",
    rules=RULES,
)
@model_option
@click.option("--prompt", help="Text to continue.")
@click.option("--ids", help="Token ids to continue, separated by commas, such as 464,3290.")
@click.option(
    "--prompts",
    "prompts_file",
    type=PATH,
    metavar="FILE",
    help="File of prompts to continue, one per line (LF or CRLF): texts, or JSON objects with "
    "prompt or ids, and an id that is repeated; prints one JSON object per prompt.",
)
@click.option(
    "--template",
    metavar="NAME|FILE|DIR",
    help="Render each prompt as `gptj data instruct` renders records, up to the completion: with "
    "alpaca, dolly, plain, plain-chat, chat (the tokenizer's own), a Jinja file, or the template "
    "of the records in a folder. JSON objects then hold instruction and input, or messages.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Render each prompt with the tokenizer's chat template or, without one, with the template "
    "of the records that the run trained on.",
)
@click.option(
    "--batch-size",
    type=COUNT,
    default=8,
    show_default=True,
    help="Number of prompts of a file that are continued together.",
)
@click.option(
    "--truncate",
    is_flag=True,
    help="Drop the beginning of a prompt that is too long, instead of refusing it.",
)
@choice_options
@click.option(
    "--seed",
    type=COUNT_OR_ZERO,
    default=0,
    show_default=True,
    help="Seed of the sampling; each further continuation takes the next seed.",
)
@click.option(
    "--logprobs",
    is_flag=True,
    help="Add the log-probability of every new token to the JSON object, by the logits before any "
    "option alters them.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of the weights in memory and of the products; 16 bits take half the memory, and "
    "round.  [default: float32]",
)
@execution_option
@backend_option
@memory_option
def generate(
    output: Output,
    model: Path | None,
    prompt: str | None,
    ids: str | None,
    prompts_file: Path | None,
    template: str | None,
    chat: bool,
    batch_size: int,
    truncate: bool,
    seed: int,
    logprobs: bool,
    dtype: str | None,
    execution: str | None,
    backend: str | None,
    memory: int | None,
    **asked: Any,
) -> dict[str, Any]:
    """Continue a prompt, given as text or as token ids, or every prompt of a file.

    Options that are not given are as the model's generation_config.json says.
    """
    rendered = chat or template is not None
    prompts = _prompts(prompt, ids, prompts_file, asked["stop_strings"], for_template=rendered)
    if logprobs and not (output.json or prompts_file):
        raise click.UsageError("--logprobs is part of a JSON object: give --json or --prompts")
    from gptj_convert.checkpoint.open import open_checkpoint
    from gptj_convert.resources.footprint import cache_bytes
    from gptj_convert.settings.generation_settings import generation_defaults, stop_tokens
    from runner.generation.choices import choose_options
    from runner.generation.prompts import begin_all

    path = model or default_model()
    folder = path if path.is_dir() else path.parent
    budget = MemoryBudget(output, memory)
    way = execution_within(memory, execution, lambda: stated_execution(folder))
    if dtype and way == Execution.STREAMING:
        raise click.UsageError(
            f"--dtype is of a model in memory, and the execution is {way}, which computes in "
            f"float32: leave it out, or add --execution {Execution.RESIDENT}"
        )
    with open_checkpoint(path) as checkpoint, ExitStack() as lent:
        config = checkpoint.config
        defaults = generation_defaults(folder, config)
        choices = choose_options(asked, defaults, seed)
        _note_choices(output, choices, defaults)
        tokenizer = _tokenizer(output, folder, prompts, choices)
        ends = {*stop_tokens(folder, config)}
        if rendered:
            prompts, more = _rendered(output, folder, prompts, template)
            ends |= more
        begun = begin_all(prompts, tokenizer, choices.options, config, truncate=truncate)
        _note_dropped(output, begun)

        def keep(checkpoint: Checkpoint) -> Residency:
            batch = min(batch_size, len(begun)) * choices.options.rows
            length = max(len(b.ids) + choices.options.most(len(b.ids), config) for b in begun)
            states = cache_bytes(config, batch, length)
            return budget.keep(checkpoint, Load(batch=batch, length=length, states=states))

        generator = _generator(
            checkpoint,
            keep if way == Execution.STREAMING else None,
            ends,
            choices,
            tokenizer,
            dtype or DTYPES[0],
            backend,
            lent,
        )
        printed = Printed(
            output, tokenizer, choices.options, logprobs=logprobs, only_completion=rendered
        )
        if prompts_file is None:
            return printed.one(generator, begun[0].ids) | budget.fields
        return {"continuations": printed.many(generator, begun, batch_size), **budget.fields}


def _prompts(
    prompt: str | None,
    ids: str | None,
    file: Path | None,
    stops: Sequence[str],
    *,
    for_template: bool,
) -> list[Prompt]:
    from runner.generation.prompts import checked_argument, prompt_of_argument, read_prompts

    for stop in stops:
        checked_argument("--stop", stop)
    if file is not None:
        return read_prompts(file, for_template=for_template)
    if prompt is None and ids is None:
        raise click.UsageError("nothing to continue: give --prompt, --ids or --prompts")
    return [prompt_of_argument(prompt, ids)]


def _rendered(
    output: Output, folder: Path, prompts: Sequence[Prompt], template: str | None
) -> tuple[list[Prompt], set[int]]:
    """Return the prompts as a template renders them, and the ids of tokens that end an answer.

    Args:
        output: where notes go.
        folder: folder of the model and its tokenizer.
        prompts: prompts to render.
        template: template of --template; None stands for --chat.
    """
    from runner.generation.prompt_templates import PromptRenderer
    from runner.generation.template_choice import chat_templates, named_templates

    chosen = chat_templates(folder) if template is None else named_templates(template, folder)
    for note in chosen.notes:
        output.note(note)
    renderer = PromptRenderer(chosen.stated, folder)
    return renderer(prompts), renderer.ends


def _note_choices(output: Output, choices: Choices, defaults: GenerationDefaults) -> None:
    from runner.generation.choices import in_words

    name = defaults.file.name
    if choices.taken:
        output.note(f"note: {name} sets {in_words(choices.taken)}")
    if defaults.unapplied:
        output.note(f"note: {name} sets {in_words(defaults.unapplied)}, which is not applied")


def _note_dropped(output: Output, begun: Sequence[Begun]) -> None:
    dropped = [b for b in begun if b.dropped]
    if len(dropped) == 1:
        (b,) = dropped
        output.note(
            f"note: {b.prompt.where}: the first {b.dropped:,} tokens of the prompt are dropped, "
            f"{len(b.ids):,} stay"
        )
    elif dropped:
        total = sum(b.dropped for b in dropped)
        output.note(
            f"note: {len(dropped):,} prompts lose their beginning, {total:,} tokens in all, the "
            f"first at {dropped[0].prompt.where}"
        )


def _tokenizer(
    output: Output, folder: Path, prompts: Sequence[Prompt], choices: Choices
) -> Tokenizer | None:
    """Return the model's tokenizer; a special token's name in a prompt is read as that token.

    Returns:
        The tokenizer, or None if there is none and ids alone are given.

    Raises:
        GptjError: there is none, and a text is given or a stop string.
    """
    from gptj_model.errors import FileFault, UsageError
    from runner.data.making.tokenizer import load_tokenizer

    try:
        note_tokenizer(output, folder)
        return load_tokenizer(folder, allow_special=None)
    except FileFault as fault:
        if any(prompt.ids is None for prompt in prompts):
            raise
        if choices.stop_strings:
            raise UsageError(
                f"a stop string needs the model's tokenizer, and {fault.message}"
            ) from None
        output.note(f"note: {fault.message}; ids are printed instead of text")
        return None


def _generator(
    checkpoint: Checkpoint,
    keep: Callable[[Checkpoint], Residency] | None,
    ends: Collection[int],
    choices: Choices,
    tokenizer: Tokenizer | None,
    dtype: str,
    backend: str | None,
    lent: ExitStack,
) -> Generator:
    from runner.cli.shared import framework

    framework.prepare(backend=backend)
    from gptj_model.decoding.generation import Generator
    from runner.evaluation.restore import model_of
    from runner.generation.stop_strings import StopStrings

    model = model_of(checkpoint, keep=keep, dtype=dtype, lent=lent)
    if tokenizer is None or not choices.stop_strings:
        return Generator(model, stop_at=ends)
    return Generator(model, stop_at=ends, stops=StopStrings(tokenizer, choices.stop_strings))


class Printed:
    """Continuations, printed as they are made.

    Args:
        output: sink of the texts.
        tokenizer: tokenizer of the model; None prints ids.
        options: options of generation.
        logprobs: whether JSON objects hold the log-probabilities of new tokens.
        only_completion: whether texts are printed without the prompt; JSON objects hold both.
    """

    def __init__(
        self,
        output: Output,
        tokenizer: Tokenizer | None,
        options: GenerationOptions,
        *,
        logprobs: bool,
        only_completion: bool = False,
    ) -> None:
        self._output = output
        self._tokenizer = tokenizer
        self._options = options
        self._logprobs = logprobs
        self._only_completion = only_completion

    def one(self, generator: Generator, begun: Sequence[int]) -> dict[str, Any]:
        """Print the continuations of one prompt, a single one as it is generated, and return their
        fields of the JSON object."""
        if self._options.rows == 1:
            return self._streamed(generator, begun)
        (found,) = generator([begun], self._options)
        fields = self._fields(begun, found)
        for sequence in fields.get("sequences", [fields]):
            self._output.data(_shown(sequence))
        return fields

    def many(
        self, generator: Generator, begun: Sequence[Begun], batch_size: int
    ) -> list[dict[str, Any]]:
        """Print a JSON object for each prompt of a file, and return all of them."""
        made: list[dict[str, Any]] = []
        for at in range(0, len(begun), batch_size):
            group = begun[at : at + batch_size]
            found = generator([b.ids for b in group], self._options, first=at)
            for b, continuations in zip(group, found, strict=True):
                fields = self._fields(b.ids, continuations)
                made.append({**b.prompt.carried, "prompt": b.prompt.text, **fields})
                self._output.record(made[-1])
        return made

    def _streamed(self, generator: Generator, begun: Sequence[int]) -> dict[str, Any]:
        shown, fields = "", None
        try:
            for continuation in generator.stream(begun, self._options):
                fields = self._fields(begun, [continuation])
                text = fields.get("completion", fields["text"])
                # The bytes of a character may come in several tokens.
                if text and text.startswith(shown) and not text.endswith("\ufffd"):
                    self._output.part(text[len(shown) :])
                    shown = text
        except (KeyboardInterrupt, Terminated):
            if fields:
                self._output.data(_shown(fields).removeprefix(shown))
            raise
        assert fields is not None, "there is room for a token"
        self._output.data(_shown(fields).removeprefix(shown))
        return fields

    def _fields(
        self, begun: Sequence[int], continuations: Sequence[Continuation]
    ) -> dict[str, Any]:
        """Return text, ids and log-probabilities of the best continuation, and of each if several
        were asked for."""
        each = [self._sequence(begun, continuation) for continuation in continuations]
        several = {"sequences": each} if self._options.num_return_sequences > 1 else {}
        return {**each[0], **several}

    def _sequence(self, begun: Sequence[int], continuation: Continuation) -> dict[str, Any]:
        ids = [*begun, *continuation.ids]
        decode = self._tokenizer and self._tokenizer.decode
        text = decode(ids, skip_special_tokens=False) if decode else None
        logprobs = {"logprobs": continuation.logprobs} if self._logprobs else {}
        completion: dict[str, Any] = {}
        if self._only_completion and decode:
            completion["completion"] = decode(continuation.ids, skip_special_tokens=False)
        return {"text": text, **completion, "ids": ids, **logprobs}


def _shown(sequence: Mapping[str, Any]) -> str:
    """Return a text, or its ids where there is no tokenizer."""
    text = sequence.get("completion", sequence["text"])
    return " ".join(map(str, sequence["ids"])) if text is None else text
