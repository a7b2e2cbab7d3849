"""What the devices of a mesh hold and exchange in a step of the 6B, from the compiled program.

    python benchmarks/scale_out.py [--layers 28] [MESH ...]

A mesh is BATCHxMODEL, such as 8x1, with "+" behind it for `runconfig.shard_weights`. The step is
compiled for as many virtual devices of this machine's processor, without allocating anything: one
sequence of 2,048 tokens for each row of the mesh, recomputed blocks, float32. The bytes exchanged
are the results of the program's collectives, those in a loop counted once per round.

With `--tpu v5p:2x2x1` it prints the memory of the step on one chip in mixed bfloat16 instead, by
TPU's own compiler: `pip install libtpu` gives it, and it needs no TPU.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MESHES = ("1x1", "8x1", "8x1+", "1x8", "8x8+", "64x8+")
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b(f32|bf16|f16|s32|u32|pred)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(
    r"(?:body|calls|to_apply|called_computations|branch_computations)=\{?%([\w.-]+)"
)


def exchanged(program: str) -> Counter[str]:
    """Return the bytes of the results of each kind of collective, for one device and one step."""
    found: Counter[str] = Counter()
    bodies = dict(_computations(program))
    entry = next(line for line in program.splitlines() if line.startswith("ENTRY"))

    def add(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            result, _, call = line.partition(" = ")
            kind = next((k for k in _KINDS if re.search(rf"\b{k}(-start)?\(", call)), None)
            if kind:
                shape = call[: call.index(kind)]
                found[kind] += times * sum(_size(*a) for a in _ARRAY.findall(shape))
            if " while(" in line:
                trips = _TRIPS.search(line)
                assert trips, f"a loop of unknown length: {result}"
                add(_CALLED.findall(line)[0], times * int(trips[1]))
            elif called := _CALLED.findall(line):
                for other in called:
                    add(other, times)

    add(re.findall(r"%([\w.-]+)", entry)[0], 1)
    return found


def _computations(program: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in program.splitlines():
        if line and line[0] in "%E" and line.endswith("{"):
            name, lines = re.findall(r"%([\w.-]+)", line)[0], []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _size(dtype: str, shape: str) -> int:
    count = _BYTES[dtype]
    for number in filter(None, shape.split(",")):
        count *= int(number)
    return count


def parameters(layers: int, mesh: tuple[int, int], *, sharded: bool, halves: bool) -> Any:
    """Return the parameters of a step of the 6B's shape."""
    import runner
    from runner.config.params_file import load_params

    path = Path(runner.__file__).parent / "configs/params_gptj_6b_continued.yaml"
    return load_params(path, {
        "model.num_hidden_layers": layers,
        "model.mixed_precision": halves,
        "model.mixed_precision_dtype": "bfloat16",
        "optimizer.moments_dtype": "bfloat16" if halves else "float32",
        "optimizer.grad_accum_steps": 1,
        "train_input.batch_size": mesh[0],
        "eval_input.batch_size": mesh[0],
        "runconfig.backend": "jax",
        "runconfig.mesh": list(mesh),
        "runconfig.shard_weights": sharded,
    })  # fmt: skip


def compiled(params: Any) -> Any:
    """Return the compiled step."""
    from runner.data.reading.input_fn import empty_batch
    from runner.training.devices.distribution import Alone
    from runner.training.executors.sharded import ShardedExecutor

    section = params.train_input
    batch = empty_batch(section.batch_size, section.max_sequence_length)
    return ShardedExecutor(params.config, params, Path("nowhere"), Alone()).compiled(batch)


def row(name: str, layers: int) -> str:
    """Return the table's row of a mesh."""
    batch, model = map(int, name.rstrip("+").split("x"))
    params = parameters(layers, (batch, model), sharded=name.endswith("+"), halves=False)
    program = compiled(params)
    held = program.memory_analysis().argument_size_in_bytes
    sums = exchanged(program.as_text())
    kinds = ", ".join(f"{kind} {size / 1e9:.1f} GB" for kind, size in sums.most_common())
    shown = f"[{batch}, {model}]" + " sharded" * name.endswith("+")
    return f"| {batch * model} | {shown} | {held / 1e9:.2f} GB | {kinds or '–'} |"


def on_tpu(topology: str, layers: int) -> None:
    """Print the memory of the step on one chip."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    import jax
    from jax.experimental import topologies

    from runner.training.executors import sharded

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    mesh = jax.sharding.Mesh([[device]], ("batch", "model"))
    sharded.device_mesh = lambda params: mesh
    base = parameters(layers, (1, 1), sharded=False, halves=True)
    wide = base.optimizer.model_copy(update={"moments_dtype": "float32"})
    lora = type(base.model).model_validate(
        base.model.model_dump() | {"lora": {"rank": 8, "base_dtype": "bfloat16"}}
    )
    cases = {
        "all weights, moments in bfloat16": base,
        "all weights, moments in float32": base.model_copy(update={"optimizer": wide}),
        "LoRA, base in bfloat16": base.model_copy(update={"model": lora}),
    }
    print("| | weights and slots | peak |\n| --- | --- | --- |")
    for name, params in cases.items():
        memory = compiled(params).memory_analysis()
        held, peak = memory.argument_size_in_bytes, memory.peak_memory_in_bytes
        print(f"| {name} | {held / 1e9:.1f} GB | {peak / 1e9:.1f} GB |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("meshes", nargs="*", default=MESHES)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tpu")
    options = parser.parse_args()
    os.environ |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if options.tpu:
        on_tpu(options.tpu, options.layers)
        return
    if "XLA_FLAGS" not in os.environ:  # which JAX reads once
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=512"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    print("| devices | mesh | weights and slots | results of exchanges per step |")
    print("| --- | --- | --- | --- |")
    for name in options.meshes:
        print(row(name, options.layers), flush=True)


if __name__ == "__main__":
    main()
