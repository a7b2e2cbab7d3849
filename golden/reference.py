"""The reference: Hugging Face's PyTorch GPT-J, run block by block. The only user of its model.

Weights come through the table from any source, so nothing is unpickled by torch, and memory is
that of one block.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import GPTJConfig as HFConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.gptj.modeling_gptj import GPTJBlock

from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.source import TensorSource, read_rows, read_tensor
from gptj_model.tensors import Scheme, Tensor, block, embedding, head


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

    def load_head(self) -> None:
        """Make the final norm and the head resident, in place of the block."""
        del self._block
        D, V = self._config.n_embd, self._config.vocab_size
        rows = {t.hf: self._read(t) for t in head(self._config)}
        if self._config.tie_word_embeddings:
            rows["lm_head.weight"] = self._read(embedding(self._config))
        with torch.device("meta"):
            self._ln_f = torch.nn.LayerNorm(D, eps=self._config.layer_norm_epsilon)
            self._head = torch.nn.Linear(D, V)
        for module, prefix in ((self._ln_f, "transformer.ln_f."), (self._head, "lm_head.")):
            state = {k.removeprefix(prefix): v for k, v in rows.items() if k.startswith(prefix)}
            module.load_state_dict(state, strict=True, assign=True)

    @torch.no_grad()
    def logits(self, x_BTD: np.ndarray) -> np.ndarray:
        """Hidden states after the last block → (B, T, V)."""
        return self._head(self._ln_f(torch.from_numpy(x_BTD))).numpy()

    def _read(self, tensor: Tensor) -> torch.Tensor:
        (name,) = tensor.names(self._scheme)
        values = tensor.op(self._scheme, Scheme.HF)(read_tensor(self._source, name))
        return torch.from_numpy(np.ascontiguousarray(self._rounded(values)))

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        if self._round_to is not None:
            values = values.astype(self._round_to, copy=False)
        return values.astype(np.float32, copy=False)
