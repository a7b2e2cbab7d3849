"""The Keras model against Hugging Face's, on random weights of healthy scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import torch
import transformers

from gptj_model.decoding.generation import Generator
from gptj_model.decoding.options import GenerationOptions
from gptj_model.network.loss import token_loss
from gptj_model.network.model import GPTJ
from gptj_model.network.weights import variables
from gptj_model.tensors import Scheme, table
from runner.evaluation.restore import load_model
from tests.conftest import make_checkpoint

#: Largest |Δ| of a logit; the logits' standard deviation is about 1. Measured: 4e-6.
TOLERANCE = 1e-4

SHAPES = {
    "small": {},
    "one head": {"n_head": 1, "n_layer": 1},
    "whole head rotated": {"rotary_dim": 12},
    "wide": {"n_embd": 96, "n_head": 3, "rotary_dim": 32, "n_inner": 100},
    "tied": {"tie_word_embeddings": True},
    "other epsilon": {"layer_norm_epsilon": 1e-2},
}


def _hf(path: Path) -> transformers.GPTJForCausalLM:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="module")
def small(small_hf: Path) -> GPTJ:
    """The model of `small_hf`, whose programs are compiled once."""
    return load_model(small_hf)


def _ids(vocab_size: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape)


def _hf_logits(model, ids: np.ndarray, **kwargs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        tensors = {k: torch.from_numpy(v) for k, v in kwargs.items()}
        return model(torch.from_numpy(ids), **tensors).logits.numpy()


def _continued(
    model: GPTJ, prompts: list[list[int]], stop_at: Sequence[int] = (), **options: Any
) -> list[list[int]]:
    """The new tokens of each prompt."""
    found = Generator(model, stop_at=stop_at)(prompts, GenerationOptions(**options))
    return [only.ids for (only,) in found]


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("start", [0, 1000, 2000])
def test_logits_at_several_shapes_and_positions(fields: dict, start: int, tmp_path: Path):
    path = make_checkpoint(tmp_path / "hf", **fields)
    model = load_model(path)
    ids = _ids(model.config.vocab_size, (2, 48))
    positions = np.arange(start, start + 48)[None]
    expected = _hf_logits(_hf(path), ids, position_ids=positions)
    found = model(ids, positions_BT=positions).numpy()
    assert expected.std() > 0.3
    assert np.abs(found - expected).max() <= TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_of_half_precision_weights(dtype: str, tmp_path: Path):
    path = make_checkpoint(tmp_path / "hf", dtype=dtype)
    ids = _ids(211, (1, 64))
    found = load_model(path)(ids).numpy()
    assert np.abs(found - _hf_logits(_hf(path), ids)).max() <= TOLERANCE


def test_logits_over_the_longest_sequence(small_hf: Path, small: GPTJ):
    ids = _ids(211, (1, 2048))
    found = small(ids).numpy()
    assert np.abs(found - _hf_logits(_hf(small_hf), ids)).max() <= TOLERANCE


def test_padding_is_not_seen(small_hf: Path, small: GPTJ):
    ids = _ids(211, (2, 20))
    mask = np.ones((2, 20), np.int64)
    mask[0, :7] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    expected = _hf_logits(_hf(small_hf), ids, attention_mask=mask, position_ids=positions)
    found = small(ids, positions_BT=positions, attention_mask_BT=mask).numpy()
    real = mask.astype(bool)
    assert np.abs(found - expected)[real].max() <= TOLERANCE
    alone = small(ids[:1, 7:]).numpy()
    assert np.abs(found[0, 7:] - alone[0]).max() <= TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_every_tensor(tied: bool, tmp_path: Path):
    path = make_checkpoint(tmp_path / "hf", tie_word_embeddings=tied)
    ids = _ids(211, (2, 33))
    ids, labels = ids[:, :-1], ids[:, 1:].copy()
    ignored = np.zeros(labels.shape, np.float32)
    ignored[0, 20:] = 1

    model = load_model(path)
    weights = variables(model)
    with tf.GradientTape() as tape:
        loss = token_loss(model(ids, training=True), tf.constant(labels, tf.int32), ignored).mean
    gradients = tape.gradient(loss, [w.value for w in weights.values()])
    found = dict(zip(weights, (tf.convert_to_tensor(g).numpy() for g in gradients), strict=True))

    hf = _hf(path)
    logits = hf(torch.from_numpy(ids)).logits
    targets = torch.from_numpy(np.where(ignored == 1, -100, labels))
    hf_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    hf_loss.backward()
    expected = {name: p.grad.numpy() for name, p in hf.named_parameters()}

    assert float(loss) == pytest.approx(hf_loss.item(), rel=1e-6)
    for tensor in table(model.config):
        gradient = tensor.op(Scheme.HF, Scheme.KERAS)(expected[tensor.hf])
        scale = np.abs(gradient).max()
        assert scale > 0, tensor.hf
        assert np.abs(found[tensor.hf] - gradient).max() <= 1e-5 * scale + 1e-8, tensor.hf


@pytest.mark.parametrize("prompt", [[5], list(range(40, 57))], ids=["one token", "17 tokens"])
def test_greedy_continuation_is_transformers_own(prompt: list[int], small_hf: Path, small: GPTJ):
    with torch.no_grad():
        expected = _hf(small_hf).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    (found,) = _continued(small, [prompt], max_new_tokens=40)
    assert prompt + found == expected[0].tolist()


def test_prompts_of_several_lengths_do_not_see_one_another(small: GPTJ):
    prompts = [[5], list(range(40, 57)), [9, 8, 7]]
    how = {"temperature": 0.8, "max_new_tokens": 30}
    together = _continued(small, prompts, seed=3, **how)
    for n, prompt in enumerate(prompts):
        assert _continued(small, [prompt], seed=3 + n, **how) == [together[n]]


def test_a_penalty_for_repetition_is_transformers_own(small_hf: Path, small: GPTJ):
    prompt = [5, 17, 3, 99]
    with torch.no_grad():
        expected = _hf(small_hf).generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 4, dtype=torch.int64),
            max_new_tokens=30, do_sample=False, repetition_penalty=1.3, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    (found,) = _continued(small, [prompt], repetition_penalty=1.3, max_new_tokens=30)
    assert prompt + found == expected[0].tolist()
    assert found != _continued(small, [prompt], max_new_tokens=30)[0]


def test_a_text_that_has_ended_does_not_end_the_others(small: GPTJ):
    prompts = [[5], [9, 8, 7]]
    whole = _continued(small, prompts, max_new_tokens=20)
    end = next(i for i in whole[0][3:] if i not in whole[1])
    at = whole[0].index(end)
    ended = _continued(small, prompts, stop_at=[end], max_new_tokens=20)
    assert ended == [whole[0][:at], whole[1]]


@pytest.mark.parametrize(("width", "least"), [(1, 0), (4, 0), (4, 6)])
def test_beam_search_is_transformers_own(width: int, least: int, small_hf: Path, small: GPTJ):
    prompt, hf = [5, 17, 3, 99], _hf(small_hf)
    how = {"max_new_tokens": 16, "min_new_tokens": least}
    # Tokens that the search meets, so that texts do end.
    ours = {"num_beams": width, "early_stopping": width > 1, **how}
    for end in _continued(small, [prompt], stop_at=[0], **ours)[0][2:14:4]:
        with torch.no_grad():
            expected = hf.generate(
                torch.tensor([prompt]), num_beams=width, do_sample=False, eos_token_id=end,
                early_stopping=width > 1, pad_token_id=end, **how,
            )  # fmt: skip
        (found,) = _continued(small, [prompt], stop_at=[end], **ours)
        assert found == [i for i in expected[0, len(prompt) :].tolist() if i != end]


def test_cached_decoding_equals_the_full_pass(small: GPTJ):
    ids = _ids(211, (2, 24))
    full = small(ids).numpy()
    caches = small.empty_caches(2, 24)
    pieces = []
    for start, stop in ((0, 11), (11, 12), (12, 24)):
        logits, caches = small.call_cached(ids[:, start:stop], caches, start)
        pieces.append(logits.numpy())
    assert np.abs(np.concatenate(pieces, axis=1) - full).max() <= TOLERANCE


def test_a_seed_repeats_what_it_sampled(small: GPTJ):
    how = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "max_new_tokens": 30}
    first = _continued(small, [[1, 2, 3]], seed=4, **how)
    assert first == _continued(small, [[1, 2, 3]], seed=4, **how)
    assert first != _continued(small, [[1, 2, 3]], seed=5, **how)


def test_dropout_is_the_steps_alone(tmp_path: Path):
    path = make_checkpoint(tmp_path / "hf", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2)
    model = load_model(path)
    ids = _ids(211, (1, 16))

    def run(step: int) -> np.ndarray:
        model.seeds.state.assign([0, step])
        return model(ids, training=True).numpy()

    assert np.array_equal(run(1 << 12), run(1 << 12))
    assert not np.array_equal(run(1 << 12), run(2 << 12))
    assert np.array_equal(model(ids).numpy(), model(ids).numpy())
