"""Generation against transformers' own: processors, every option, in memory and streamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs
from transformers.generation.stopping_criteria import StopStringCriteria

from gptj_convert.checkpoint.open import open_checkpoint
from gptj_model.decoding import processors as ours
from gptj_model.decoding.generation import Generator
from gptj_model.decoding.options import GenerationOptions
from gptj_model.decoding.search import BeamSearch, Task
from runner.data.making.tokenizer import load_tokenizer
from runner.evaluation.restore import load_model, model_of
from runner.generation.stop_strings import StopStrings
from tests.conftest import make_checkpoint
from tests.small_tokenizer import END_ID, write_vocabulary

V = 17

#: Scores with ties, of both signs.
SCORES = st.lists(
    st.one_of(st.integers(-3, 3).map(float), st.floats(-9, 9, width=32)), min_size=V, max_size=V
).map(lambda values: np.array(values, np.float32))
IDS = st.lists(st.integers(0, V - 1), min_size=1, max_size=12)


def _processed(processor: Any, scores_V: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    found = processor(torch.tensor([list(ids)]), torch.from_numpy(scores_V.copy())[None])
    return found[0].numpy()


@given(SCORES, IDS, st.sampled_from([0.5, 1.3, 7.0]))
def test_repetition_penalty(scores_V: np.ndarray, ids: list[int], penalty: float):
    expected = _processed(theirs.RepetitionPenaltyLogitsProcessor(penalty), scores_V, ids)
    np.testing.assert_array_equal(ours.penalize(scores_V, ids, penalty), expected)


@given(SCORES, st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 5))
def test_no_repeated_ngrams(scores_V: np.ndarray, ids: list[int], size: int):
    expected = _processed(theirs.NoRepeatNGramLogitsProcessor(size), scores_V, ids)
    np.testing.assert_array_equal(ours.ban_ngrams(scores_V, ids, size), expected)


@given(SCORES, st.integers(1, V + 3))
@example(np.zeros(V, np.float32), 3)
def test_top_k(scores_V: np.ndarray, k: int):
    expected = _processed(theirs.TopKLogitsWarper(k), scores_V, [0])
    np.testing.assert_array_equal(ours.keep_top_k(scores_V, k), expected)


@given(SCORES, st.floats(0.01, 0.99), st.integers(1, 4))
@example(np.zeros(V, np.float32), 0.5, 1)
@example(np.array([1, 0] * 8 + [1], np.float32), 0.7, 1)
def test_top_p(scores_V: np.ndarray, p: float, keep: int):
    mass = np.cumsum(np.sort(ours.softmax(scores_V.astype(np.float64))))
    assume(np.abs(mass - (1 - p)).min() > 1e-6)  # else rounding decides
    expected = _processed(theirs.TopPLogitsWarper(p, min_tokens_to_keep=keep), scores_V, [0])
    # Which ones of equal scores are kept is up to PyTorch's sort.
    found = ours.keep_top_p(scores_V, p, keep)
    np.testing.assert_array_equal(np.sort(found), np.sort(expected))


OPTIONS = {
    "repetition_penalty": st.sampled_from([1.0, 0.8, 1.4]),
    "no_repeat_ngram_size": st.integers(0, 3),
    "min_new_tokens": st.one_of(st.none(), st.integers(0, 4)),
    "min_length": st.integers(0, 14),
    "temperature": st.sampled_from([0.3, 1.0, 1.7]),
    "top_k": st.integers(0, V),
    "top_p": st.sampled_from([1.0, 0.9, 0.4]),
    "num_beams": st.integers(1, 2),
}


@pytest.fixture(scope="module")
def processors_of(folder: Path):
    """Function that returns the processors that transformers makes of its options."""
    model = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=V, n_embd=8, n_layer=1, n_head=1, rotary_dim=4)
    )

    def make(prompt: int, ends: Sequence[int], **options: Any) -> Any:
        config = transformers.GenerationConfig(**options, do_sample=True, eos_token_id=list(ends))
        if config.min_new_tokens is not None:
            config.min_length = config.min_new_tokens + prompt
        model._prepare_special_tokens(config, device="cpu")
        return model._get_logits_processor(config, input_ids_seq_length=prompt)

    return make


@settings(deadline=None)
@given(
    SCORES,
    IDS,
    st.integers(1, 8),
    st.lists(st.integers(0, V - 1), min_size=1, max_size=3, unique=True),
    st.fixed_dictionaries(OPTIONS),
)
def test_all_processors_in_their_order(
    processors_of,
    scores_V: np.ndarray,
    ids: list[int],
    prompt: int,
    ends: list[int],
    options: dict[str, Any],
):
    prompt = min(prompt, len(ids))
    mine = GenerationOptions(**options)
    expected = _processed(processors_of(prompt, ends, **options), scores_V, ids)
    process = ours.Processors(mine, ends, mine.least(prompt))
    found = process(scores_V, ids, len(ids) - prompt)
    if mine.top_p < 1:
        plain = GenerationOptions(**options | {"top_p": 1.0})
        before = ours.Processors(plain, ends, mine.least(prompt))(scores_V, ids, len(ids) - prompt)
        assume(np.isfinite(before.max()))
        mass = np.cumsum(np.sort(ours.softmax(before.astype(np.float64))))
        assume(np.abs(mass - (1 - mine.top_p)).min() > 1e-6)
    if mine.top_p < 1:  # see `test_top_p`
        found, expected = np.sort(found), np.sort(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the small tokenizer."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("generation") / "hf", vocab_size=263, n_layer=2, n_positions=64
    )
    write_vocabulary(folder)
    return folder


@pytest.fixture(scope="module")
def hf(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> tuple[Any, Any]:
    """Our tokenizer, and that of transformers."""
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def models(folder: Path):
    """The model in memory, and streamed."""
    with open_checkpoint(folder) as checkpoint:
        from gptj_model.streaming.residency import NOTHING_RESIDENT

        yield load_model(folder), model_of(checkpoint, keep=lambda _: NOTHING_RESIDENT)


PROMPTS = [[5], list(range(40, 57)), [9, 8, 7]]


@pytest.fixture(scope="module")
def likely(hf: Any) -> list[int]:
    """Tokens that continuations hold, so that texts can end with them."""
    found: list[int] = []
    for prompt in PROMPTS:
        for penalty in (1.0, 1.5):
            ((ids, _),) = _expected(hf, prompt, [], max_new_tokens=7, repetition_penalty=penalty)
            found += ids
    return found


def _expected(
    hf: Any, prompt: list[int], ends: Sequence[int], tokenizer: Any = None, **options: Any
) -> list[tuple[list[int], list[float]]]:
    """New tokens of each sequence, and their log-probabilities by the raw logits."""
    with torch.no_grad():
        done = hf.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            eos_token_id=list(ends) or None,
            pad_token_id=0,
            tokenizer=tokenizer,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    beams = done.get("beam_indices")
    logits = [step.log_softmax(dim=-1) for step in done.logits]
    found: list[tuple[list[int], list[float]]] = []
    for n, row in enumerate(done.sequences[:, len(prompt) :].tolist()):
        # What compute_transition_scores gives, which fails where texts of several lengths have no
        # token to be filled with.
        parents = [n] * len(row) if beams is None else [b for b in beams[n].tolist() if b >= 0]
        length = next((t for t, i in enumerate(row) if i in ends), len(parents))
        ids = row[:length]
        steps = zip(logits, parents, ids, strict=False)
        found.append((ids, [float(step[parent, i]) for step, parent, i in steps]))
    return found


def _close(found: Any, expected: list[tuple[list[int], list[float]]]) -> None:
    assert [text.ids for text in found] == [ids for ids, _ in expected]
    for text, (_, logprobs) in zip(found, expected, strict=True):
        assert text.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.fixed_dictionaries(
        {
            "max_new_tokens": st.integers(1, 12),
            "repetition_penalty": st.sampled_from([1.0, 1.2]),
            "no_repeat_ngram_size": st.sampled_from([0, 0, 1, 2, 3]),
        }
    ),
    st.sampled_from(
        [{}]
        + [
            {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
            for beams in (2, 5)
            for penalty in (1.0, -1.5, 0.0, 3.0)
            for early in (False, True, "never")
        ]
    ),
    st.sampled_from([("min_new_tokens", 3), ("min_new_tokens", 0), ("min_length", 7)]),
    st.lists(st.integers(0, 41), max_size=4),
    st.lists(st.integers(0, 41), max_size=2),
    st.booleans(),
    st.data(),
)
def test_every_option_is_transformers_own(
    hf,
    models,
    tokenizers,
    likely: list[int],
    lengths: dict[str, Any],
    beams: dict[str, Any],
    least: tuple[str, int],
    ends: list[int],
    stops: list[int],
    streamed: bool,
    data: st.DataObject,
):
    """Prompts of several lengths are one batch for us, and one each for transformers."""
    backend, tokenizer = tokenizers
    options = lengths | beams | dict([least])
    if beams:
        options["num_return_sequences"] = data.draw(st.integers(1, beams["num_beams"]))
    stop_at = {likely[n] for n in ends}
    texts = [text for n in stops if (text := backend.decode([likely[n]])) and "\ufffd" not in text]
    generator = Generator(models[streamed], stop_at=stop_at, stops=StopStrings(backend, texts))
    found = generator(PROMPTS, GenerationOptions(**options))
    for prompt, own in zip(PROMPTS, found, strict=True):
        more = {"stop_strings": texts} if texts else {}
        _close(own, _expected(hf, prompt, sorted(stop_at), tokenizer, **options, **more))


@pytest.mark.parametrize("seed", range(12))
def test_a_beam_search_ends_where_that_of_transformers_does(seed: int, hf, likely: list[int]):
    """The search alone, on the logits of PyTorch, with many ends."""
    draw = np.random.default_rng(seed)
    beams = int(draw.integers(2, 5))
    options: dict[str, Any] = {
        "num_beams": beams,
        "num_return_sequences": beams,
        "max_new_tokens": 12,
        "length_penalty": float(draw.choice([-1.0, 0.0, 1.0, 2.0, 4.0])),
        "early_stopping": [False, True, "never"][seed % 3],
    }
    prompt = PROMPTS[int(draw.integers(3))]
    ends = {int(i) for i in draw.choice(likely, size=int(draw.integers(1, 9)))}
    mine = GenerationOptions(**options)
    task = Task(
        prompt=prompt,
        process=ours.Processors(mine, ends),
        most=12,
        ends=frozenset(ends),
        stops=lambda prompt, new: False,
    )
    search, texts = BeamSearch(task, mine, None), [prompt] * beams
    while not search.done:
        with torch.no_grad():
            logits_KV = hf(torch.tensor(texts)).logits[:, -1].numpy()
        ids_K, parents_K = search.step(logits_KV)
        texts = [[*texts[p], int(i)] for i, p in zip(ids_K, parents_K, strict=True)]
    _close(search.found(), _expected(hf, prompt, sorted(ends), **options))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("most", [4, 20])
def test_lengths_of_the_whole_text(streamed: bool, most: int, hf, models):
    options = {"max_length": most, "min_length": most - 2, "num_beams": 2}
    prompts = [prompt for prompt in PROMPTS if len(prompt) < most]
    mine = GenerationOptions(max_new_tokens=None, **options)
    for prompt, own in zip(prompts, Generator(models[streamed])(prompts, mine), strict=True):
        assert len(prompt) + len(own[0].ids) == most
        _close(own, _expected(hf, prompt, [], **options))


def test_samples_have_their_own_seeds(models):
    options = {"temperature": 1.3, "max_new_tokens": 9}
    generator = Generator(models[0])
    three = GenerationOptions(num_return_sequences=3, seed=5, **options)
    found = [[text.ids for text in own] for own in generator(PROMPTS, three)]
    for n, prompt in enumerate(PROMPTS):
        for m in range(3):
            one = GenerationOptions(seed=5 + 3 * n + m, **options)
            assert generator([prompt], one)[0][0].ids == found[n][m]
    assert len({tuple(ids) for own in found for ids in own}) == 9


def test_sampled_beams(models):
    """One token of two beams: the better of two draws without replacement of four."""
    task = Task(
        prompt=[0],
        process=ours.Processors(GenerationOptions(num_beams=2, temperature=1.0)),
        most=1,
        ends=frozenset(),
        stops=lambda prompt, new: False,
    )
    options = GenerationOptions(num_beams=2, temperature=1.0)
    logits_KV = np.log(np.array([[0.1, 0.2, 0.3, 0.4, 1e-9, 1e-9, 1e-9]] * 2, np.float32))
    counts = np.zeros(7)
    for seed in range(2000):
        search = BeamSearch(task, options, np.random.default_rng(seed))
        search.step(logits_KV)
        counts[search.found()[0].ids[0]] += 1
    p = [0.1, 0.2, 0.3, 0.4]
    pairs = {(i, j): p[i] * p[j] / (1 - p[i]) for i in range(4) for j in range(4) if i != j}
    expected = [sum(q for pair, q in pairs.items() if max(pair) == i) for i in range(4)]
    assert counts[:4] / 2000 == pytest.approx(expected, abs=0.04)
    found = Generator(models[0])(PROMPTS, GenerationOptions(num_beams=3, temperature=2.0))
    again = Generator(models[1])(PROMPTS, GenerationOptions(num_beams=3, temperature=2.0))
    assert [text.ids for (text,) in found] == [text.ids for (text,) in again]


@given(
    st.lists(
        st.sampled_from(["hell", "o w", "wo", "é", "l", "<|end", "\n"]), min_size=1, max_size=3
    ),
    st.lists(
        st.sampled_from([*range(256, 263), 39, 71, 72, 78, 75, 127, 102, 220, 300]),
        min_size=1,
        max_size=9,
    ),
)
@settings(deadline=None)
def test_stop_strings(tokenizers, texts: list[str], ids: list[int]):
    backend, tokenizer = tokenizers
    expected = StopStringCriteria(tokenizer, texts)(torch.tensor([ids]), None)
    assert StopStrings(backend, texts)([], ids) == bool(expected[0])


def test_a_stop_string_ends_in_the_last_token(tokenizers):
    backend, _ = tokenizers
    hello, space_wo = backend.token_to_id("hello"), backend.token_to_id("Ġwo")
    stops = StopStrings(backend, ["lo w"])
    assert stops([], [hello, space_wo])
    assert stops([hello], [space_wo])
    assert not stops([], [hello])
    assert not stops([hello, space_wo], [hello])
    assert StopStrings(backend, ["<|end"])([], [END_ID])
    assert not StopStrings(backend, [])([], [hello])
