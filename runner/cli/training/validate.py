"""Validation of a run up to its first step: parameters, records and headers, and the compiled step
if asked for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.shared.fetching import with_local_records
from runner.cli.shared.output import Output
from runner.cli.training.dry_run import print_costs, refuse_a_full_disk
from runner.cli.training.parameters import checkpoints_to_evaluate, is_training
from runner.cli.training.preflight import preflight, say_facts, sections_of
from runner.config.execution import Backend, Execution

if TYPE_CHECKING:
    from gptj_model.config import GPTJConfig
    from gptj_model.tensors import Tensor
    from runner.cli.training.job import Job
    from runner.config.params import Params


def rehearse(output: Output, job: Job, params: Params) -> dict[str, Any]:
    """Check everything up to the first step, and return the fields of the JSON object."""
    from gptj_convert.resources import footprint
    from runner.config.trainable import trainable_rows

    if job.only == "compile" and params.runconfig.execution == Execution.STREAMING:
        raise click.UsageError("--compile-only compiles the step of a resident run")
    trains = is_training(job)
    if not trains:
        checkpoints_to_evaluate(job, params)
    local = with_local_records(output, params, *sections_of(job, params))
    facts = preflight(job, local, params.runconfig.workers)
    config, target = facts.config, facts.target
    say_facts(output, facts, output.data)
    section = params.train_input if trains else params.eval_input
    assert section, "checked"
    length = section.max_sequence_length
    tokens, rows = section.batch_size * length, trainable_rows(config, params)
    flops = tokens * footprint.token_flops(config, length, rows)
    if not trains:
        flops = tokens * footprint.token_flops(config, length) / 3
    fields: dict[str, Any] = {
        "parameters": footprint.parameters(config),
        "trained_parameters": sum(t.size for t in rows),
        "flops_per_batch": round(flops),
        "epochs": facts.fields,
    }
    output.data(
        f"{fields['parameters']:,} parameters, {fields['trained_parameters']:,} of them trained; "
        f"a batch of {tokens:,} tokens takes {flops / 1e12:.3g} TFLOP"
    )
    if _on_jax(params):
        planned, memory = _planned_devices(params, config, rows)
        output.data(memory)
        fields |= planned
    elif trains:
        fields |= print_costs(output, job, params, config, target)
    if trains:
        if job.only == "validate":  # a step may be compiled for a machine with other disks
            refuse_a_full_disk(job, params, config, target)
        fields |= {"step": facts.step, "target": target}
    if job.only == "compile":
        fields |= _compile(output, job, params)
    return fields


def _planned_devices(
    params: Params, config: GPTJConfig, trained: Sequence[Tensor]
) -> tuple[dict[str, Any], str]:
    """Return what each device of the mesh will hold; nothing heavy is imported if the YAML names
    the mesh."""
    from gptj_convert.resources import footprint
    from gptj_model.tensors import SLOTS
    from runner.config.mesh import mesh_of
    from runner.config.trainable import model_rows

    def devices() -> tuple[int, int]:
        import jax

        return 1, jax.device_count()

    mesh, optimizer = mesh_of(params, devices), params.optimizer
    model = params.model
    halves = model.recompute and model.mixed_precision
    held = footprint.device_state(
        model_rows(config, params),
        mesh,
        trained=trained,
        slots=len(SLOTS[optimizer.optimizer_type]),
        of_others=model.lora.base_dtype if model.lora else "float32",
        of_gradients=model.mixed_precision_dtype if halves else "float32",
        of_slots=optimizer.moments_dtype,
        accumulated=optimizer.grad_accum_steps > 1,
        shard_weights=params.runconfig.shard_weights,
    )
    total = sum(held.values())
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in held.items())
    return (
        {"mesh": [mesh.batch, mesh.model], "bytes_per_device": held | {"total": total}},
        f"each of {mesh} devices (batch × model) holds {total / 1e9:.2f} GB beside activations: "
        + parts,
    )


def _compile(output: Output, job: Job, params: Params) -> dict[str, Any]:
    from runner.cli.shared import framework

    framework.prepare(backend=params.runconfig.backend)
    if _on_jax(params):
        return _compile_sharded(output, job, params)
    from gptj_model.network.model import GPTJ
    from runner.data.reading.input_fn import empty_batch
    from runner.evaluation.compiled import ResidentEvaluator
    from runner.training.devices.distribution import Alone
    from runner.training.executors.step import TrainStep
    from runner.training.update.optimizer import Optimizer
    from runner.training.weights.lora import trained_weights

    config = params.config
    model = GPTJ(config, dtype=params.dtype_policy, recompute=params.model.recompute)
    section = params.train_input if job.mode == "train" else params.eval_input
    assert section is not None, "checked"
    batch = empty_batch(section.batch_size, section.max_sequence_length)
    begun = time.monotonic()
    if job.mode == "train":
        _, weights = trained_weights(model, params)
        optimizer = Optimizer(params.optimizer, weights)
        accumulate = params.optimizer.grad_accum_steps
        program = TrainStep(model, optimizer, accumulate, Alone()).compiled(batch)
    else:
        program = ResidentEvaluator(model).compiled(batch)
    seconds = time.monotonic() - begun
    instructions = program.count(" = ")
    output.data(f"compiled in {seconds:.1f} s to {instructions:,} instructions")
    return {"compile_seconds": round(seconds, 3), "instructions": instructions}


def _compile_sharded(output: Output, job: Job, params: Params) -> dict[str, Any]:
    from runner.data.reading.input_fn import empty_batch
    from runner.training.devices.distribution import Alone
    from runner.training.executors.sharded import ShardedExecutor

    section = params.train_input
    batch = empty_batch(section.batch_size, section.max_sequence_length)
    executor = ShardedExecutor(params.config, params, job.model_dir, Alone())
    begun = time.monotonic()
    program = executor.compiled(batch)
    seconds = time.monotonic() - begun
    instructions = program.as_text().count(" = ")
    temporary = program.memory_analysis().temp_size_in_bytes
    output.data(
        f"compiled in {seconds:.1f} s to {instructions:,} instructions; besides weights and slots "
        f"a device needs {temporary / 1e9:.2f} GB"
    )
    return {
        "compile_seconds": round(seconds, 3),
        "instructions": instructions,
        "temporary_bytes_per_device": temporary,
    }


def _on_jax(params: Params) -> bool:
    return params.runconfig.backend == Backend.JAX
