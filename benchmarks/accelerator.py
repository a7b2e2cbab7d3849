"""Speed and memory on an accelerator, beside PyTorch with transformers on the same card.

    python benchmarks/accelerator.py train|train-peer|generate|generate-peer [--preset 6b]
        [--set n_layer=2 …] [--batch 8] [--length 2048] [--steps 5] [--flash] [--lora] [--new 64]

Each call measures one side and prints one JSON object; `gpu/stages.py` runs them all and prints the
table. Weights are random and made on the device, so nothing is read.

Training: the step of `gptj train --backend jax` (recomputed blocks, bfloat16 products, AdamW,
clipped norm), and transformers' Trainer with gradient checkpointing, bfloat16 and fused AdamW, with
the first of sdpa and eager that the model implements. Both get the same number of tokens; a batch
that does not fit is halved. The first step compiles and is not counted; the median of the others
counts. MFU counts the model's operations, without those that are recomputed
(`footprint.token_flops`), against the card's dense bfloat16 rate. With --lora both train an adapter
of rank 8 beside bfloat16 weights.

Generation: greedy, one prompt, bfloat16 weights, by `gptj_model.decoding.generation.Generator`, and
by transformers' `generate`. Rates are those after the first token; every token reads all weights
once, hence the share of the card's memory bandwidth.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gptj_convert.resources import footprint
from gptj_model.config import GPTJConfig

RATE = 1e-5
RANK = 8


@dataclass(frozen=True, slots=True)
class Card:
    """What the maker states of a GPU."""

    flops: float
    """Dense products of bfloat16 per second, in operations."""
    bandwidth: float
    """Bytes of memory read per second."""


#: Cards by a part of their name, the first that matches; NVIDIA's data sheets.
CARDS = {
    "H200": Card(989e12, 4.8e12),
    "H100 PCIe": Card(756e12, 2.0e12),
    "H100 NVL": Card(835e12, 3.9e12),
    "H100": Card(989e12, 3.35e12),
    "A100": Card(312e12, 2.04e12),
}


def card(name: str) -> Card | None:
    """Return the data of a card; None if it is unknown."""
    return next((found for part, found in CARDS.items() if part in name), None)


@dataclass(frozen=True, slots=True)
class Shape:
    """What is trained, or generated."""

    config: GPTJConfig
    batch: int
    length: int
    steps: int
    flash: bool = False
    lora: bool = False
    new: int = 64

    def ids(self, step: int) -> np.ndarray:
        """Return random ids, int32 (batch, length + 1)."""
        size = self.batch, self.length + 1
        return np.random.default_rng(step).integers(0, self.config.vocab_size, size, dtype=np.int32)


#: What a side chose to do: attention, dtype of its weights and of its moments.
Notes = dict[str, str]
#: A function that yields after each step or token; the first of a training compiles.
Side = Callable[[Shape, Notes], Iterator[Any]]


# Training.


def train(shape: Shape, notes: Notes) -> Iterator[Any]:
    """Yield after each step of the executor that `gptj train --backend jax` runs."""
    from runner.cli.shared import framework

    framework.prepare(backend="jax")
    from runner.training.devices.distribution import Alone
    from runner.training.executors.sharded import ShardedExecutor

    params = params_of(shape)
    notes |= {
        "attention": "flash" if shape.flash else "plain",
        "weights": "bfloat16" if shape.lora else "float32",
        "moments": params.optimizer.moments_dtype,
    }
    executor = ShardedExecutor(shape.config, params, Path("unused"), Alone())
    if shape.flash:
        notes["flash_difference"] = f"{furthest(shape, params):.1e}"
    fill(executor)
    for step in range(shape.steps + 1):
        ids = shape.ids(step)
        ignored = np.zeros((shape.batch, shape.length), np.float32)
        found = executor.step([(ids[:, :-1], ignored, ids[:, 1:])], (0, step), 1.0, RATE)
        executor.advance()
        yield found.loss


def params_of(shape: Shape) -> Any:
    """Return the parameters of the run that is measured."""
    from runner.config.params_file import validate

    config = shape.config
    values: dict[str, Any] = {
        "train_input": {
            "data_dir": "unused", "vocab_size": config.vocab_size, "batch_size": shape.batch,
            "max_sequence_length": shape.length,
        },
        "model": {
            "hidden_size": config.n_embd, "num_heads": config.n_head,
            "num_hidden_layers": config.n_layer, "rotary_dim": config.rotary_dim,
            "max_position_embeddings": config.n_positions, "share_embedding_weights": False,
            "layer_norm_epsilon": config.layer_norm_epsilon, "recompute": True,
            "mixed_precision": True, "mixed_precision_dtype": "bfloat16",
            "flash_attention": shape.flash,
        },
        "optimizer": {
            "optimizer_type": "adamw", "learning_rate": RATE, "max_gradient_norm": 1.0,
            "use_bias_correction": True,
        },
        "runconfig": {"backend": "jax", "mesh": [1, 1]},
    }  # fmt: skip
    if shape.lora:
        values["model"]["lora"] = {"rank": RANK, "base_dtype": "bfloat16"}
    elif memory_of_gpu() < 20 * footprint.parameters(config):
        values["optimizer"]["moments_dtype"] = "bfloat16"
    return validate(values, {}, where="benchmark")


def furthest(shape: Shape, params: Any) -> float:
    """Return the figure that `golden.tolerances.FLASH_ATTENTION` limits, on this device."""
    from gptj_model.network.flash_attention import flash_attention
    from runner.evaluation.flash_attention import prove

    return max(prove(shape.config, params, flash_attention(shape.config)).values())


def fill(executor: Any) -> None:
    """Give every weight random values on the device, where the executor's own would come from the
    processor: biases 0, gains 1, matrices of a small deviation."""
    import jax
    import jax.numpy as jnp

    def matrices(key: Any, shape: Any, rows: int) -> Any:
        one = shape.shape[-2:]
        # Row by row: the random bits take as much memory as the values.
        drawn = jax.lax.map(
            lambda k: 0.02 * jax.random.normal(k, one, shape.dtype), jax.random.split(key, rows)
        )
        return drawn.reshape(shape.shape)

    for n, arrays in enumerate(executor.arrays):
        for m, (name, shape) in enumerate(arrays.shapes.items()):
            key = jax.random.fold_in(jax.random.key(n, impl="rbg"), m)
            rows = len(arrays.rows[name])
            if len(arrays.rows[name][0].shape) == 1:
                values = jnp.full(shape.shape, float(name.endswith("weight")), shape.dtype)
                values = jax.device_put(values, shape.sharding)
            else:
                draw = jax.jit(matrices, static_argnums=(1, 2), out_shardings=shape.sharding)
                values = draw(key, shape, rows)
            arrays.update({name: values})


def train_peer(shape: Shape, notes: Notes) -> Iterator[Any]:
    """Yield after each step of transformers' Trainer."""
    import threading
    from queue import Queue

    done: Queue[Any] = Queue()

    def run() -> None:
        try:
            _trainer(shape, notes, done.put).train()
        except BaseException as e:
            done.put(e)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(shape.steps + 1):
        if isinstance(found := done.get(), BaseException):
            raise found
        yield found
    thread.join()


def _trainer(shape: Shape, notes: Notes, report: Callable[[Any], None]) -> Any:
    import torch
    from torch.utils.data import Dataset
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Rows(Dataset):
        def __len__(self) -> int:
            return shape.batch * (shape.steps + 1)

        def __getitem__(self, n: int) -> dict[str, Any]:
            step, row = divmod(n, shape.batch)
            ids = torch.from_numpy(shape.ids(step)[row, :-1].astype(np.int64))
            return {"input_ids": ids, "labels": ids}

    class Reported(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            report(None)

    has_gpu = torch.cuda.is_available()
    # As Trainer does it: weights and moments in float32 where they fit, products in bfloat16.
    wide = not shape.lora and memory_of_gpu() > 20 * footprint.parameters(shape.config)
    dtype = torch.float32 if wide else torch.bfloat16
    model = peer_model(shape.config, dtype, notes)
    if shape.lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]
        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=targets))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="accelerator-"),
        per_device_train_batch_size=shape.batch,
        max_steps=shape.steps + 1,
        bf16=True,
        use_cpu=not has_gpu,
        gradient_checkpointing=True,
        optim="adamw_torch_fused",
        learning_rate=RATE,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=has_gpu,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[Reported()])
    trainer.remove_callback(PrinterCallback)  # stdout is for the figures
    return trainer


def peer_model(config: GPTJConfig, dtype: Any, notes: Notes) -> Any:
    """Return transformers' model with random weights made on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config.to_hf(dtype="float32")
    theirs = AutoConfig.for_model(values.pop("model_type"), **values)
    theirs.use_cache = False
    for attention in ("sdpa", "eager"):
        try:
            with torch.device(torch_device()):
                model = AutoModelForCausalLM.from_config(
                    theirs, attn_implementation=attention, dtype=dtype
                )
            notes |= {"attention": attention, "weights": str(dtype).removeprefix("torch.")}
            return model
        except (ValueError, ImportError):
            if attention == "eager":
                raise
    raise AssertionError("eager attention always exists")


def measure_training(shape: Shape, steps: Side) -> dict[str, Any]:
    """Return the figures of one side's training; a batch that does not fit is halved."""
    notes: Notes = {}
    while True:
        try:
            seconds, losses = _timed(steps(shape, notes))
            break
        except Exception as e:
            if not _is_out_of_memory(e) or shape.batch == 1:
                raise
            print(f"a batch of {shape.batch} does not fit: {str(e)[:200]}", file=sys.stderr)
        gc.collect()
        shape = replace(shape, batch=shape.batch // 2)
    first, *others = seconds
    step = statistics.median(others)
    rate = shape.batch * shape.length / step
    trained = None
    if shape.lora:
        from runner.config.trainable import trainable_rows

        trained = trainable_rows(shape.config, params_of(shape))
    flops = footprint.token_flops(shape.config, shape.length, trained) * rate
    return {
        "batch": shape.batch, "length": shape.length, "tokens_per_second": round(rate, 1),
        "seconds_per_step": round(step, 4), "first_step_seconds": round(first, 1),
        "tflops": round(flops / 1e12, 4), "losses": losses, **notes,
    }  # fmt: skip


def _timed(steps: Iterator[Any]) -> tuple[list[float], list[float]]:
    seconds, losses = [], []
    begun = time.perf_counter()
    for loss in steps:
        seconds.append(time.perf_counter() - begun)
        losses += [] if loss is None else [round(float(loss), 4)]
        begun = time.perf_counter()
    return seconds, losses


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return "out of memory" in text or "resource_exhausted" in text


# Generation.


def generate(shape: Shape, notes: Notes) -> Iterator[float]:
    """Yield the seconds of each token of a prompt's continuation, which was compiled before."""
    from runner.cli.shared import framework

    framework.prepare(backend="jax")
    import jax

    from gptj_model.decoding.decoders import compiled_step
    from gptj_model.decoding.generation import CACHE_STEP, Generator
    from gptj_model.decoding.options import GenerationOptions
    from gptj_model.network.model import GPTJ

    notes |= {"attention": "plain", "weights": "bfloat16"}
    model = GPTJ(shape.config, dtype="bfloat16")
    draw = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, "bfloat16"), static_argnums=1
    )
    key = jax.random.key(0, impl="rbg")
    for n, variable in enumerate(model.trainable_variables):
        if len(variable.shape) > 1:
            variable.assign(draw(jax.random.fold_in(key, n), variable.shape))
        elif variable.path.endswith("gamma"):
            variable.assign(np.ones(variable.shape))
    generator = Generator(model)
    prompt = shape.ids(0)[0, :-1].tolist()
    options = GenerationOptions(max_new_tokens=shape.new)
    for _ in generator.stream(prompt, options):
        pass
    begun = time.perf_counter()
    for _ in generator.stream(prompt, options):
        yield time.perf_counter() - begun
        begun = time.perf_counter()
    length = -(-(len(prompt) + shape.new) // CACHE_STEP) * CACHE_STEP
    rate = unawaited(compiled_step(model), model.empty_caches(1, length), length)
    notes["unawaited_tokens_per_second"] = f"{rate:.1f}"


def unawaited(step: Any, caches: Any, length: int, tokens: int = 32) -> float:
    """Return the tokens per second of steps that do not wait for one another's logits: what the
    device alone allows, where `Generator` chooses each token on the processor."""
    import jax

    ids, visible = np.zeros((1, 1), np.int32), np.ones((1, length), bool)
    begun = 0.0
    for n in range(tokens + 1):
        if n == 1:  # the first one compiles
            jax.block_until_ready(caches)
            begun = time.perf_counter()
        logits, caches = step(ids, np.full((1, 1), n, np.int32), visible, caches, np.int32(n))
    jax.block_until_ready((logits, caches))
    return tokens / (time.perf_counter() - begun)


def generate_peer(shape: Shape, notes: Notes) -> Iterator[float]:
    """Yield the seconds of the first token and the mean of the others, by transformers."""
    import torch

    model = peer_model(shape.config, torch.bfloat16, notes)
    model.eval()
    ids = torch.from_numpy(shape.ids(0)[:1, :-1].astype(np.int64)).to(torch_device())

    def seconds(new: int) -> float:
        begun = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, use_cache=True, pad_token_id=0,
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    seconds(shape.new)
    first = seconds(1)
    yield first
    rest = (seconds(shape.new) - first) / (shape.new - 1)
    yield from [rest] * (shape.new - 1)


def measure_generation(shape: Shape, tokens: Side) -> dict[str, Any]:
    """Return the figures of one side's generation."""
    notes: Notes = {}
    first, *others = tokens(shape, notes)
    rate = 1 / statistics.mean(others)
    config = shape.config
    # Of the embedding a single row is read.
    read = 2 * (footprint.parameters(config) - config.vocab_size * config.n_embd)
    return {
        "prompt": shape.length, "new": shape.new, "first_token_seconds": round(first, 4),
        "tokens_per_second": round(rate, 2), "gigabytes_per_second": round(rate * read / 1e9, 4),
        **notes,
    }  # fmt: skip


# The device.


def torch_device() -> str:
    """Return the device that PyTorch computes on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_of_gpu() -> float:
    """Return the bytes of memory of the first GPU; infinite without one."""
    from gptj_convert.resources.gpu import gpus

    found = gpus()
    return (found[0].memory if found else None) or float("inf")


def device_figures(peer: bool) -> dict[str, Any]:
    """Return the device's name, the library, and the most memory that was used."""
    if peer:
        import torch
        import transformers

        library = f"torch {torch.__version__}, transformers {transformers.__version__}"
        if not torch.cuda.is_available():
            return {"device": "cpu", "library": library, "peak_bytes": None}
        peak = torch.cuda.max_memory_allocated()
        return {"device": torch.cuda.get_device_name(), "library": library, "peak_bytes": peak}
    import jax

    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {"device": device.device_kind, "library": f"jax {jax.__version__}", "peak_bytes": peak}


def shares(found: dict[str, Any]) -> dict[str, Any]:
    """Return what share of the card's rates was reached, if they are known."""
    if not (rates := card(found["device"])):
        return {}
    if "tflops" in found:
        return {"mfu": round(found["tflops"] * 1e12 / rates.flops, 4)}
    return {"bandwidth": round(found["gigabytes_per_second"] * 1e9 / rates.bandwidth, 4)}


SIDES: dict[str, Side] = {
    "train": train,
    "train-peer": train_peer,
    "generate": generate,
    "generate-peer": generate_peer,
}


def main() -> None:
    """Measure one side and print its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--preset", default="6b")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=N")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--flash", action="store_true")
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    fields = {key: int(value) for key, _, value in (text.partition("=") for text in options.set)}
    config = GPTJConfig.preset(options.preset, **fields)
    shape = Shape(config, options.batch, options.length, options.steps, options.flash,
                  options.lora, options.new)  # fmt: skip
    measure = measure_training if options.side.startswith("train") else measure_generation
    found = measure(shape, SIDES[options.side])
    found |= device_figures(options.side.endswith("peer"))
    print(json.dumps(found | shares(found)))


if __name__ == "__main__":
    main()
