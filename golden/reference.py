"""The reference: Hugging Face's PyTorch GPT-J, run block by block. No other module imports it.

Weights come through the table from any source, so torch unpickles nothing, and memory is that of
one block.

Shape suffixes: B batch, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers import GPTJConfig as HFConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.gptj.modeling_gptj import GPTJBlock

from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import HF_BLOCK, Scheme, Tensor, block, final_norm
from gptj_model.vocabulary import parts, read_embeddings, read_head

#: Functions that torch passes to MKL's vector mathematics on a CPU, and that this model uses.
_VECTOR_MATH = ("sin", "cos", "tanh", "exp", "log", "sqrt", "square", "reciprocal")


def _resolve_vector_math() -> None:
    """Call each vector function of MKL once in one thread, before any is needed.

    MKL chooses a kernel at the first call of a function. When several threads make that call at
    once, one may get a kernel of low accuracy (pytorch/pytorch#188792): sines of the rotary angles
    were wrong by 1.5e-4 in about one process of 25.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for name in _VECTOR_MATH:
            getattr(torch, name)(one)
        torch.pow(one, one)


_resolve_vector_math()


class ReferenceBlock:
    """One block of the reference with its weights in memory, until the next block is loaded.

    Hidden states are float32 or float64 numpy arrays of shape (B, T, D), in and out.

    Args:
        number: index of the block in the model.
        forward: the block as a function of states, positions and cache.
        layer: Hugging Face's module.
    """

    def __init__(self, number: int, forward: Callable[..., torch.Tensor], layer: GPTJBlock) -> None:
        self.number = number
        self._forward = forward
        self._layer = layer

    @torch.no_grad()
    def run(self, x_BTD: np.ndarray, positions_BT: np.ndarray) -> np.ndarray:
        """Return the hidden states after the block, for whole sequences at these positions."""
        return self._forward(torch.from_numpy(x_BTD), positions_BT).numpy()

    @torch.no_grad()
    def run_cached(
        self, x_BTD: np.ndarray, positions_BT: np.ndarray, cache: DynamicCache
    ) -> np.ndarray:
        """Return the hidden states after the block, for tokens that follow those in the cache.

        Args:
            x_BTD: hidden states of these tokens before the block.
            positions_BT: int32 position of each of these tokens.
            cache: cache of this block and these sequences; these tokens are added to it.
        """
        return self._forward(torch.from_numpy(x_BTD), positions_BT, cache).numpy()

    @torch.no_grad()
    def operations(self, x_BTD: np.ndarray, positions_BT: np.ndarray) -> dict[str, np.ndarray]:
        """Return the result of each of `gptj_model.network.observation.OPERATIONS`."""
        seen: dict[str, torch.Tensor] = {}
        attn, mlp = self._layer.attn, self._layer.mlp
        modules = {
            "ln_1": self._layer.ln_1,
            "q_proj": attn.q_proj,
            "k_proj": attn.k_proj,
            "v_proj": attn.v_proj,
            "out_proj": attn.out_proj,
            "fc_in": mlp.fc_in,
            "gelu": mlp.act,
            "fc_out": mlp.fc_out,
        }

        def keep(name: str):
            return lambda module, inputs, output: seen.update({name: output})

        weigh = attn._attn

        def keep_rotated(query: torch.Tensor, key: torch.Tensor, *rest: Any):
            seen.update(rotary_q=query, rotary_k=key)
            weighed, seen["softmax"] = weigh(query, key, *rest)
            return weighed, seen["softmax"]

        hooks = [m.register_forward_hook(keep(name)) for name, m in modules.items()]
        hooks.append(
            attn.out_proj.register_forward_pre_hook(
                lambda module, inputs: seen.update(attention=inputs[0])
            )
        )
        attn._attn = keep_rotated
        try:
            seen["residual"] = self._forward(torch.from_numpy(x_BTD), positions_BT)
        finally:
            del attn._attn
            for hook in hooks:
                hook.remove()
        return {name: value.numpy() for name, value in seen.items()}


@dataclass(frozen=True, slots=True)
class TokenLikelihoods:
    """How likely N tokens are at their places; every array has one entry per token."""

    logprobs_N: np.ndarray
    """Log-probability of the token, float64."""
    greedy_N: np.ndarray
    """Whether the token is the most likely one."""
    mean_N: np.ndarray
    """Mean of the logits over the vocabulary, float64."""
    square_N: np.ndarray
    """Mean square of the logits over the vocabulary, float64."""


class _RunningLikelihoods:
    """Likelihoods of tokens from logits that arrive a part of the vocabulary at a time, in float64.

    Args:
        labels_N: int32 ids of the tokens.
    """

    def __init__(self, labels_N: np.ndarray) -> None:
        self._labels_N = torch.from_numpy(labels_N.astype(np.int64))
        shape = self._labels_N.shape
        self._log_sum_N = torch.full(shape, -torch.inf, dtype=torch.float64)
        self._top_N = torch.full(shape, -torch.inf)
        self._best_N = torch.zeros(shape, dtype=torch.int64)
        self._label_N, self._sum_N, self._square_N = torch.zeros((3, *shape), dtype=torch.float64)

    def add(self, logits_CV: torch.Tensor, first: int, start: int) -> None:
        """Add float32 logits of tokens from number `first` on, for token ids from `start` on."""
        tokens = slice(first, first + len(logits_CV))
        top_C, best_C = logits_CV.max(-1)
        better_C = top_C > self._top_N[tokens]
        self._top_N[tokens] = torch.where(better_C, top_C, self._top_N[tokens])
        self._best_N[tokens] = torch.where(better_C, best_C + start, self._best_N[tokens])
        wide_CV = logits_CV.double()
        self._log_sum_N[tokens] = torch.logaddexp(self._log_sum_N[tokens], wide_CV.logsumexp(-1))
        self._sum_N[tokens] += wide_CV.sum(-1)
        self._square_N[tokens] += wide_CV.square().sum(-1)
        place_C = self._labels_N[tokens] - start
        inside_C = (place_C >= 0) & (place_C < logits_CV.shape[1])
        found_C = wide_CV.gather(-1, torch.where(inside_C, place_C, 0)[:, None])[:, 0]
        self._label_N[tokens] = torch.where(inside_C, found_C, self._label_N[tokens])

    def likelihoods(self, vocab_size: int) -> TokenLikelihoods:
        """Return the likelihoods, once every part is added."""
        return TokenLikelihoods(
            logprobs_N=(self._label_N - self._log_sum_N).numpy(),
            greedy_N=(self._best_N == self._labels_N).numpy(),
            mean_N=(self._sum_N / vocab_size).numpy(),
            square_N=(self._square_N / vocab_size).numpy(),
        )


class StreamedReference:
    """The stages of a forward pass, with the calls of `gptj_model.streaming.forward.StreamedModel`.

    Computation has the dtype of the hidden states, float32 or float64; attention scores and their
    softmax are always float32, as in the model itself.

    Args:
        config: configuration of the model.
        source, scheme: weights, and the scheme of their names.
        round_to: canonical dtype that weights are rounded to first, so that a difference of
            rounding alone does not count as one of computation; None leaves them as they are.
    """

    def __init__(
        self,
        config: GPTJConfig,
        source: TensorSource,
        scheme: Scheme,
        *,
        round_to: str | None = None,
    ) -> None:
        self.config = config
        self._source = source
        self._scheme = scheme
        self._round_to = NUMPY[round_to] if round_to else None
        self._hf_config = HFConfig(**config.own_fields())
        self._hf_config._attn_implementation = "eager"
        self._block = GPTJBlock(self._hf_config, layer_idx=0).eval()
        self._prefix = ""

    def embed(self, ids_BT: np.ndarray, *, rounded: bool = True) -> np.ndarray:
        """Return the embeddings of token ids, float32 (B, T, D); only their rows are read."""
        rows_BTD = read_embeddings(self.config, self._source, self._scheme, ids_BT)
        return self._float32(rows_BTD, rounded)

    def load_block(self, i: int, *, rounded: bool = True) -> ReferenceBlock:
        """Read block `i`, and return it; it takes the place of the block before."""
        self._prefix = prefix = HF_BLOCK.format(i=i)
        tensors = block(self.config, i)
        state = {t.hf.removeprefix(prefix): self._read(t, rounded) for t in tensors}
        self._block.float().load_state_dict(state, strict=True)
        return ReferenceBlock(i, self._forward, self._block)

    @staticmethod
    def empty_cache() -> DynamicCache:
        """Return an empty cache of one block."""
        return DynamicCache()

    def head(self, *, last: bool = False) -> StreamedReference:
        """Return what follows the blocks: `normed` and `logits`.

        Args:
            last: whether no block is loaded afterwards, so that the memory of blocks is freed.
        """
        if last:
            del self._block
        return self

    @torch.no_grad()
    def normed(self, states: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return hidden states (B, T, D) after the last block, normed."""
        layer = self._loaded_norm()
        found = []
        for x_BTD in states:
            x = torch.from_numpy(x_BTD)
            found.append(layer.to(x.dtype)(x).numpy())
        return found

    def _loaded_norm(self) -> torch.nn.LayerNorm:
        config = self.config
        layer = torch.nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        rows = {t.hf.rpartition(".")[2]: self._read(t) for t in final_norm(config)}
        layer.load_state_dict(rows, strict=True)
        return layer

    @torch.no_grad()
    def logits(self, normed: Sequence[np.ndarray], *, rounded: bool = True) -> list[np.ndarray]:
        """Return logits (B, T, V) of normed hidden states (B, T, D), a part of the vocabulary at a
        time."""
        found = [np.empty((*x.shape[:2], self.config.vocab_size), x.dtype) for x in normed]
        for start, stop in parts(self.config):
            weight_VD, bias_V = self._read_head(start, stop, rounded)
            for h_BTD, logits_BTV in zip(normed, found, strict=True):
                h = torch.from_numpy(h_BTD)
                weights = weight_VD.to(h.dtype), bias_V.to(h.dtype)
                logits_BTV[..., start:stop] = torch.nn.functional.linear(h, *weights).numpy()
        return found

    @torch.no_grad()
    def likelihoods(
        self, normed: Sequence[np.ndarray], labels: Sequence[np.ndarray]
    ) -> list[TokenLikelihoods]:
        """Return how likely tokens are, a part of the vocabulary at a time.

        Args:
            normed: normed hidden states (1, N, D) before these tokens, of each batch.
            labels: int32 ids of the tokens, (N,) of each batch.
        """
        found = [_RunningLikelihoods(own) for own in labels]
        for start, stop in parts(self.config):
            weight_VD, bias_V = self._read_head(start, stop)
            for h_1ND, running in zip(normed, found, strict=True):
                for at in range(0, h_1ND.shape[1], self.config.n_positions):
                    h_CD = torch.from_numpy(h_1ND[0, at : at + self.config.n_positions])
                    running.add(torch.nn.functional.linear(h_CD, weight_VD, bias_V), at, start)
        return [running.likelihoods(self.config.vocab_size) for running in found]

    def _forward(
        self, x: torch.Tensor, positions_BT: np.ndarray, cache: DynamicCache | None = None
    ) -> torch.Tensor:
        positions = torch.from_numpy(positions_BT.astype(np.int64))
        mask = create_causal_mask(
            config=self._hf_config,
            inputs_embeds=x,
            attention_mask=None,
            past_key_values=cache,
            position_ids=positions,
        )
        layer = self._block.to(x.dtype)
        return layer(x, layer_past=cache, attention_mask=mask, position_ids=positions)[0]

    def _read_head(
        self, start: int, stop: int, rounded: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight (stop - start, D) and bias of the head for these tokens, float32."""
        read = read_head(self.config, self._source, self._scheme, start, stop)
        weight_VD, bias_V = (torch.from_numpy(self._float32(x, rounded)) for x in read)
        return weight_VD, bias_V

    def _read(self, tensor: Tensor, rounded: bool = True) -> torch.Tensor:
        name = tensor.name(self._scheme)
        values = tensor.op(self._scheme, Scheme.HF)(read_tensor(self._source, name))
        return torch.from_numpy(np.ascontiguousarray(self._float32(values, rounded)))

    def _float32(self, values: np.ndarray, rounded: bool) -> np.ndarray:
        if rounded and self._round_to is not None:
            values = values.astype(self._round_to, copy=False)
        return values.astype(np.float32, copy=False)
