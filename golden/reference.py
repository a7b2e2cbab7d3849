"""The reference: Hugging Face's PyTorch GPT-J, run block by block. The only user of its model.

Weights come through the table from any source, so nothing is unpickled by torch, and memory is
that of one block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import GPTJConfig as HFConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.gptj.modeling_gptj import GPTJBlock

from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.source import TensorSource, read_rows, read_tensor
from gptj_model.tensors import Scheme, Tensor, block, embedding, head
from gptj_model.vocabulary import parts, read_head

#: The functions that torch hands to MKL's vector mathematics on a CPU, and this model uses.
_VECTOR_MATH = (torch.sin, torch.cos, torch.tanh, torch.exp, torch.log, torch.sqrt, torch.pow)


def _resolve_vector_math() -> None:
    """Call each vector function of MKL once, in one thread, before any is needed.

    MKL chooses a kernel at a function's first call, and when several threads make that call at
    once, one may get a kernel of low accuracy (pytorch/pytorch#188792). Seen here: sines of the
    rotary angles wrong by 1.5e-4 in about one process of 25.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for function in _VECTOR_MATH:
            function(one, one) if function is torch.pow else function(one)


_resolve_vector_math()


class StreamedReference:
    """The stages of a forward pass in float32; the same calls as `gptj_model.streaming`.

    Args:
        config: of the model.
        source, scheme: where its weights are, and under which names.
        round_to: canonical dtype that weights are rounded to first, so that a difference of
            rounding alone does not count as one of computation; None leaves them.
    """

    def __init__(
        self,
        config: GPTJConfig,
        source: TensorSource,
        scheme: Scheme,
        *,
        round_to: str | None = None,
    ) -> None:
        self._config = config
        self._source = source
        self._scheme = scheme
        self._round_to = NUMPY[round_to] if round_to else None
        self._hf_config = HFConfig(**config.to_hf(dtype="float32"))
        self._hf_config._attn_implementation = "eager"
        self._block = GPTJBlock(self._hf_config, layer_idx=0).eval()

    def embed(self, ids_BT: np.ndarray) -> np.ndarray:
        """Rows of the embedding, read one by one: (B, T, D)."""
        (name,) = embedding(self._config).names(self._scheme)
        unique, where = np.unique(ids_BT, return_inverse=True)
        rows = [read_rows(self._source, name, int(i), int(i) + 1)[0] for i in unique]
        return self._rounded(np.stack(rows))[where.reshape(ids_BT.shape)]

    def load_block(self, i: int) -> None:
        """Make block `i` the resident one."""
        prefix = f"transformer.h.{i}."
        tensors = block(self._config, i)
        state = {t.hf.removeprefix(prefix): self._read(t) for t in tensors}
        self._block.load_state_dict(state, strict=True)

    @torch.no_grad()
    def run_block(self, x_BTD: np.ndarray, positions_T: np.ndarray) -> np.ndarray:
        """The resident block applied to whole sequences at these positions: (B, T, D)."""
        x = torch.from_numpy(x_BTD)
        positions = torch.from_numpy(positions_T.astype(np.int64))[None]
        mask = create_causal_mask(
            config=self._hf_config,
            inputs_embeds=x,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        return self._block(x, attention_mask=mask, position_ids=positions)[0].numpy()

    @torch.no_grad()
    def logits(self, states: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Hidden states (B, T, D) after the last block → (B, T, V) each.

        The head is read a part of the vocabulary at a time, in place of the block.
        """
        del self._block
        config, prefix = self._config, "transformer.ln_f."
        ln_f = torch.nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        rows = {t.hf: self._read(t) for t in head(config) if t.hf.startswith(prefix)}
        ln_f.load_state_dict({k.removeprefix(prefix): v for k, v in rows.items()}, strict=True)
        normed = [ln_f(torch.from_numpy(x_BTD)) for x_BTD in states]
        found = [np.empty((*x.shape[:2], config.vocab_size), np.float32) for x in states]
        for start, stop in parts(config):
            read = read_head(config, self._source, self._scheme, start, stop)
            weight_VD, bias_V = (torch.from_numpy(self._rounded(x)) for x in read)
            for h_BTD, logits_BTV in zip(normed, found, strict=True):
                logits = torch.nn.functional.linear(h_BTD, weight_VD, bias_V)
                logits_BTV[..., start:stop] = logits.numpy()
        return found

    def _read(self, tensor: Tensor) -> torch.Tensor:
        (name,) = tensor.names(self._scheme)
        values = tensor.op(self._scheme, Scheme.HF)(read_tensor(self._source, name))
        return torch.from_numpy(np.ascontiguousarray(self._rounded(values)))

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        if self._round_to is not None:
            values = values.astype(self._round_to, copy=False)
        return values.astype(np.float32, copy=False)
