"""A model of this program as the harness's language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tokenizers import Tokenizer
from typing_extensions import override

from gptj_model.decoding.generation import Generator
from gptj_model.decoding.likelihood import Query, scorer_of
from gptj_model.decoding.options import GenerationOptions
from gptj_model.network.model import GPTJ
from gptj_model.streaming.forward import StreamedModel
from runner.evaluation.harness.kept_answers import KeptAnswers, key_of
from runner.evaluation.harness.queries import QueryModel, Tokens, arguments, unusable

#: Fields of a task's generation_kwargs that are applied, beside those that the harness reads.
_APPLIED = {f.name for f in fields(GenerationOptions)} - {
    "max_new_tokens",
    "max_length",
    "num_return_sequences",
    "seed",
}
#: New tokens of a request that names no limit, as in the harness's own models.
_MOST = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prompt:
    """A request to generate."""

    ids: tuple[int, ...]
    until: tuple[str, ...]
    options: GenerationOptions
    number: int
    """How many equal requests that sample come before it."""

    @property
    def key(self) -> str:
        """Key of its answer."""
        options = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        return key_of("generate", self.ids, self.until, options, self.number)


class HarnessModel(QueryModel):
    """The harness's view of a model: requests are answered in batches, the longest first.

    Args:
        model: the model, in memory or streamed.
        tokens: its tokenizer, with its tokens.
        batch_size: number of texts per forward pass.
        memory: largest size in bytes of the hidden states that share one pass over the weights of a
            streamed model.
        answers: answers that are known already, and where new ones are kept.
        defaults: generation settings of the model's folder; those of a task win.

    Attributes:
        defaults: the settings that are applied.
        report: called with the numbers of requests answered and of all requests of a kind, and
            their kind.
    """

    def __init__(
        self,
        model: GPTJ | StreamedModel,
        tokens: Tokens,
        *,
        batch_size: int,
        memory: int,
        answers: KeptAnswers,
        defaults: Mapping[str, Any],
    ) -> None:
        super().__init__(tokens)
        self._scorer = scorer_of(model, batch_size, memory=memory)
        self._stops = _StopTexts(tokens.tokenizer)
        self._generator = Generator(model, stop_at=tokens.ends, stops=self._stops)
        self._batch_size = batch_size
        self._answers = answers
        self.defaults = {k: v for k, v in defaults.items() if k in _APPLIED}
        self.report: Callable[[int, int, str], None] = lambda done, total, what: None

    @override
    def _likelihoods(self, queries: Sequence[Query], what: str) -> Iterator[tuple[float, bool]]:
        keys = [key_of("likelihood", query.ids, query.scored) for query in queries]
        missing = self._answers.missing(keys)
        first = dict(zip(reversed(keys), reversed(queries), strict=True))
        total, done = len(set(keys)), len(set(keys)) - len(missing)
        self.report(done, total, what)
        for found in self._scorer([first[key] for key in missing]):
            self._answers.add({missing[i]: [a.logprob, a.greedy] for i, a in found.items()})
            done += len(found)
            self.report(done, total, what)
        return ((answer[0], answer[1]) for answer in map(self._answers.__getitem__, keys))

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        prompts = self._prompts(requests)
        keys = [prompt.key for prompt in prompts]
        missing = self._answers.missing(keys)
        first = dict(zip(reversed(keys), reversed(prompts), strict=True))
        total, done = len(set(keys)), len(set(keys)) - len(missing)
        what = "texts to generate"
        self.report(done, total, what)
        for group in self._groups([first[key] for key in missing]):
            self._answers.add(self._continued(group))
            done += len(group)
            self.report(done, total, what)
        return [self._answers[key] for key in keys]

    def _prompts(self, requests: Iterable[Instance]) -> list[_Prompt]:
        found: list[_Prompt] = []
        seen: dict[str, int] = {}
        for request in requests:
            prompt = self._prompt(request)
            if prompt.options.temperature:
                number = seen[prompt.key] = seen.get(prompt.key, -1) + 1
                seed = int(key_of(prompt.key, number), 16) % 2**31
                prompt = replace(prompt, number=number, options=replace(prompt.options, seed=seed))
            found.append(prompt)
        return found

    def _prompt(self, request: Instance) -> _Prompt:
        text, asked = arguments(request)
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(asked, _MOST))
        begin = self._tokens.tokenizer.decode([self._tokens.end], skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until"), eos=begin)
        most = kwargs.pop("max_gen_toks")
        room = self._tokens.positions - most
        if room < 1:
            raise unusable(
                request, f"max_gen_toks {most}, expected fewer than the model's "
                f"{self._tokens.positions} tokens",
            )  # fmt: skip
        ids = self.tok_encode(text) or [self._tokens.prefix]
        self.shortened += len(ids) > room
        return _Prompt(
            ids=tuple(ids[-room:]),
            until=tuple(until),
            options=self._options(request, kwargs, most),
            number=0,
        )

    def _options(self, request: Instance, kwargs: dict[str, Any], most: int) -> GenerationOptions:
        samples = kwargs.pop("do_sample")
        if unknown := kwargs.keys() - _APPLIED:
            raise unusable(
                request, f"generation_kwargs with {', '.join(sorted(unknown))}, expected "
                f"{', '.join(sorted(_APPLIED))}",
            )  # fmt: skip
        values = self.defaults | kwargs
        values["temperature"] = float(values.get("temperature") or 1.0) if samples else 0.0
        return GenerationOptions(**values, max_new_tokens=most)

    def _groups(self, prompts: Sequence[_Prompt]) -> Iterator[list[_Prompt]]:
        """Yield prompts that are continued together: those that sample one by one, so that what is
        drawn does not depend on the others."""
        alike: dict[str, list[_Prompt]] = {}
        for prompt in prompts:
            alike.setdefault(key_of(prompt.until, str(prompt.options)), []).append(prompt)
        for group in alike.values():
            group.sort(key=lambda prompt: (-len(prompt.ids), prompt.ids))
            size = 1 if group[0].options.temperature else self._batch_size
            yield from (group[at : at + size] for at in range(0, len(group), size))

    def _continued(self, group: Sequence[_Prompt]) -> dict[str, str]:
        """Return the texts that continue prompts with equal options, by the keys of the prompts."""
        tokenizer, until = self._tokens.tokenizer, group[0].until
        self._stops.texts = until
        found = self._generator([prompt.ids for prompt in group], group[0].options)
        texts = [tokenizer.decode(best.ids, skip_special_tokens=True) for best, *_ in found]
        return {
            prompt.key: postprocess_generated_text(text, list(until), None)
            for prompt, text in zip(group, texts, strict=True)
        }


class _StopTexts:
    """Function of new tokens that says whether their text, without that of the prompt, holds one of
    some texts that end it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.texts: tuple[str, ...] = ()

    def __call__(self, prompt: Sequence[int], new: Sequence[int]) -> bool:
        text = self._tokenizer.decode(list(new), skip_special_tokens=False)
        return any(stop in text for stop in self.texts if stop)
