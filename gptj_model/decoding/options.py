"""How prompts are continued: the options of generation, under transformers' names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gptj_model.config import GPTJConfig

#: When a beam search ends; see `GenerationOptions.early_stopping`.
EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOptions:
    """Options of generation, with the names and meanings of transformers' GenerationConfig.

    Lengths are those of each prompt alone, without the padding of a batch.
    """

    temperature: float = 0.0
    """Divisor of the logits before sampling; 0 takes the most likely token, which transformers
    calls `do_sample=False`."""
    top_k: int = 0
    """Number of most likely tokens to sample from, with those as likely as the last; 0 means
    all."""
    top_p: float = 1.0
    """Probability that the tokens to sample from add up to, the most likely first."""
    repetition_penalty: float = 1.0
    """Divisor of positive scores of tokens already in the text, and factor of negative ones."""
    no_repeat_ngram_size: int = 0
    """Number of successive tokens that occur together at most once in the text; 0 means any."""
    max_new_tokens: int | None = 32
    """Largest number of new tokens; None leaves it to `max_length`."""
    max_length: int | None = None
    """Largest number of tokens of prompt and continuation, unless `max_new_tokens` is given."""
    min_new_tokens: int | None = None
    """Number of new tokens before which no end is chosen; None leaves it to `min_length`."""
    min_length: int = 0
    """Number of tokens of prompt and continuation before which no end is chosen, unless
    `min_new_tokens` is given."""
    num_beams: int = 1
    """Number of beams of the search; 1 means no search."""
    length_penalty: float = 1.0
    """Power of the length that the log-probability of a beam is divided by when texts that have
    ended are compared."""
    early_stopping: EarlyStopping = False
    """When a beam search ends, once it has as many ended texts as beams: at once (True), when the
    best running beam is no better than the worst of them (False), or when it cannot become better
    ("never")."""
    num_return_sequences: int = 1
    """Number of continuations of each prompt: samples, or the best of a beam search."""
    seed: int = 0
    """Seed of the first continuation; each further one takes the next number."""

    @property
    def rows(self) -> int:
        """Number of sequences that the model computes for each prompt."""
        return max(self.num_beams, self.num_return_sequences)

    @property
    def takes_the_most_likely(self) -> bool:
        """Whether each token is that of the largest logit, but where a text may not end yet."""
        altered = self.temperature or self.no_repeat_ngram_size or self.repetition_penalty != 1
        return not altered and self.num_beams == 1

    def most(self, prompt: int, config: GPTJConfig) -> int:
        """Return the largest number of new tokens of a prompt of this length."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return min(self.max_length or config.n_positions, config.n_positions) - prompt

    def least(self, prompt: int) -> int:
        """Return the number of new tokens before which a prompt of this length does not end."""
        if self.min_new_tokens is not None:
            return self.min_new_tokens
        return self.min_length - prompt

    def room(self, config: GPTJConfig) -> int:
        """Return the largest number of tokens of a prompt."""
        if self.max_new_tokens is not None:
            return config.n_positions - self.max_new_tokens
        return min(self.max_length or config.n_positions, config.n_positions) - 1

    def problem(self, prompt: Sequence[int], config: GPTJConfig) -> str | None:
        """Return why the model cannot continue a prompt, or None if it can."""
        if not prompt:
            return "the prompt is empty, expected at least one token"
        outside = [i for i in prompt if not 0 <= i < config.vocab_size]
        if outside:
            return f"the prompt holds the id {outside[0]}, expected 0 to {config.vocab_size - 1}"
        length = len(prompt)
        if length <= self.room(config):
            return None
        if self.max_new_tokens is None:
            whole = min(self.max_length or config.n_positions, config.n_positions)
            return f"the prompt has {length} tokens, expected fewer than max_length, {whole}"
        return (
            f"prompt and continuation are {length} + {self.max_new_tokens} tokens, "
            f"expected at most the model's {config.n_positions}"
        )
