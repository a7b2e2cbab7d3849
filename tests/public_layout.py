"""A `pytorch_model.bin` as the public GPT-J-6B's is: names, buffers, and transposed weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def public_state(hf: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder's model.safetensors in the public repository's order and layout.

    The weights of linear layers are transposed views, and every block has its causal mask and
    the value that stands for minus infinity.
    """
    weights = load_file(hf / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for name, values in weights.items():
        if name.endswith("attn.q_proj.weight"):
            mask = torch.tril(torch.ones(16, 16, dtype=torch.uint8))
            attention = name.removesuffix("q_proj.weight")
            found[f"{attention}bias"] = mask.view(1, 1, 16, 16)
            found[f"{attention}masked_bias"] = torch.tensor(-1e9)
        linear = values.dim() == 2 and "wte" not in name
        found[name] = values.t().contiguous().t() if linear else values
    return found


def write_public_bin(hf: Path, *, shards: int = 1) -> None:
    """Replace a folder's model.safetensors with such a file, or with shards of it."""
    state = public_state(hf)
    (hf / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, hf / "pytorch_model.bin")
        return
    import json

    names, weight_map = list(state), {}
    for n in range(shards):
        file = f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin"
        part = names[n::shards]
        torch.save({name: state[name] for name in part}, hf / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": None, "weight_map": weight_map}
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps(index))
