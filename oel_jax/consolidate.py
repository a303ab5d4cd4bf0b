"""Server side: knowledge into weights (paper Eq. 2, spec section 8).

Per step: all prefixes of 64 games, one knowledge text drawn per prefix; the student answers without
it, the frozen teacher P_r re-reads the answer with it, and the student's top-k reverse KL is
minimised by one AdamW update. Nothing here touches a game. The baselines (`consolidate.mode`) take
the answers from demonstrations instead, see `rollouts`.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from oel_jax import negative_control
from oel_jax.distill.memory import Accumulator, used
from oel_jax.distill.packing import fill, plan, sample_weights
from oel_jax.distill.step import (
    StepConfig,
    Sums,
    optimizer,
    update,
    zeros_like,
)
from oel_jax.distill.teacher import Teacher, cache_bytes
from oel_jax.distill.topk_kl import KLConfig
from oel_jax.experience import texts_of_round
from oel_jax.lm.huggingface import save_model
from oel_jax.lm.language_model import DTYPES
from oel_jax.lm.sampler import Sampler
from oel_jax.lm.sampling import Sampling
from oel_jax.metrics import read as read_metrics
from oel_jax.metrics import table
from oel_jax.parallel.mesh import device_bytes, put_batch
from oel_jax.profiling import StepTrace
from oel_jax.rollouts import demonstrated, header, on_policy
from oel_jax.run import Run
from oel_jax.trajectories import prefixes, read


@dataclass
class _Student:
    """Float32 masters and optimizer state; `step` updates are done."""

    params: Any
    state: Any
    step: int


def consolidate(run: Run, round_number: int) -> list[Path]:
    """Train P_r into P_{r+1}; returns the policy directory. Goes on from the last checkpoint."""
    config, settings = run.config, run.config.consolidate
    source = run.policy_directory(round_number)
    teacher_model = run.policy(round_number)
    texts = texts_of_round(run, round_number, teacher_model)
    teacher = Teacher(
        teacher_model,
        texts,
        thinking=config.model.thinking,
        block=config.model.attention_block,
    )
    # Which prompts a cached prefix is made from must not depend on where a run goes on.
    first = prefixes(read(run.workdir.deploy_games(round_number, 1)))
    examples = [prefix.prompt for prefix in first[:16]]
    head = header(first)
    tx = optimizer(settings)
    dtype = DTYPES[config.model.dtype]
    step_config = StepConfig(
        model=teacher_model.cfg,
        kl=KLConfig(
            config.loss.top_k,
            config.loss.temperature,
            "nll" if settings.mode == "sft" else config.loss.divergence,
            config.loss.support,
            config.loss.correction,
            config.loss.chunk,
            negative_control.pick_support(config),
        ),
        dtype=dtype,
        remat=settings.remat,
        block=config.model.attention_block,
    )
    with _checkpoints(run, round_number) as checkpoints, jax.set_mesh(run.mesh):
        student = _start(run, source, tx, checkpoints)
        run.metrics.rewind("consolidate", round_number, student.step)
        sampler = run.sampler(
            teacher_model,
            Sampling(settings.temperature),
            prompt=config.sampler.max_prompt,
            response=config.sampler.max_response,
            prefixes=[head],
        )
        held = _held(student, teacher, examples, sampler)
        add = Accumulator(step_config, held)
        label = f"round {round_number} consolidate"
        traces = run.workdir.tensorboard / f"round_{round_number:03d}" / "consolidate"
        with (
            StepTrace(run.config.profile, traces) as trace,
            run.progress(settings.steps, "steps", label, done=student.step) as progress,
        ):
            while student.step < settings.steps:
                trace.before(student.step + 1)
                values = _step(run, round_number, student, teacher, head, sampler, add, tx)
                trace.after(student.step)
                note = f"loss {values['loss']:.4f}, {values['response_tokens']:.1f} tokens/answer"
                if student.step % settings.save_every == 0 and student.step < settings.steps:
                    checkpoints.save(
                        student.step,
                        args=ocp.args.StandardSave(
                            {"params": student.params, "state": student.state}
                        ),
                    )
                progress.update(note=note)
        checkpoints.wait_until_finished()
        policy = run.workdir.policy(round_number)
        if policy.exists():  # written by a run that was killed before it could record it
            shutil.rmtree(policy)
        # P_{r+1} is the final step, rounded to bfloat16 as in the released code (spec 8.2).
        saved = jnp.float32 if settings.keep_fp32_master else jnp.bfloat16
        save_model(policy, teacher_model.cfg, student.params, source=source, dtype=saved)
        _report(run, round_number, teacher)
        if add.temporaries:
            print(f"memory: {add.predicted / 1e9:.2f} GB predicted for a step; {used()}")
    return [policy]


def _held(
    student: _Student, teacher: Teacher, examples: list[str], sampler: Sampler
) -> dict[str, int]:
    """Bytes of one device that live through an optimizer step, by name."""
    teacher.prepare(examples)
    return {
        "student, float32": device_bytes(student.params),
        "AdamW's moments": device_bytes(student.state),
        "gradients, float32": device_bytes(student.params),
        "teacher": device_bytes(teacher.model.params),
        "knowledge, encoded": device_bytes([prefix.cache for prefix in teacher.encoded]),
        "rollout cache": sampler.bytes,
    }


def _checkpoints(run: Run, round_number: int) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        run.workdir.checkpoints(round_number),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=1,
            create=True,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        ),
    )


def _start(run: Run, source: Path, tx: Any, checkpoints: ocp.CheckpointManager) -> _Student:
    """Float32 masters of P_r with a fresh optimizer, or the last checkpoint of this round."""
    params = run.load(source, dtype="float32").params
    state = jax.jit(tx.init)(params)
    latest = checkpoints.latest_step()
    if latest is None:
        return _Student(params, state, 0)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        {"params": params, "state": state},
    )
    saved = checkpoints.restore(latest, args=ocp.args.StandardRestore(like))
    print(f"going on from optimizer step {latest}")
    return _Student(saved["params"], saved["state"], latest)


def _step(
    run: Run,
    round_number: int,
    student: _Student,
    teacher: Teacher,
    head: tuple[int, ...],
    sampler: Sampler,
    add: Accumulator,
    tx: Any,
) -> dict[str, float]:
    """One optimizer step: rollouts, teacher and student on packed micro-batches, update."""
    settings, number = run.config.consolidate, student.step + 1
    began = time.monotonic()
    if settings.mode == "on_policy":
        parts = (student.params, teacher, head, sampler)
        samples, stopped = on_policy(run, round_number, number, *parts)
    else:
        samples, stopped = demonstrated(run, round_number, number, teacher)
    rolled_out = time.monotonic()
    shape, batches = plan(samples, settings.token_budget, run.mesh.shape["fsdp"])
    weights = sample_weights(samples, batches, run.config.loss.aggregation)
    gradients = zeros_like(student.params)
    total = None
    for text, rows in batches:
        batch = put_batch(run.mesh, fill(samples, weights, rows, shape))
        cache = teacher.prefix(text).cache
        gradients, sums = add(gradients, student.params, teacher.model.params, cache, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    student.params, student.state, done = update(
        student.params, student.state, gradients, tx=tx, clip_norm=settings.clip_norm
    )
    student.step = number
    total, done = jax.device_get((total, done))
    seconds = {"rollout": rolled_out - began, "update": time.monotonic() - rolled_out}
    return _log(run, round_number, number, samples, stopped, total, done, seconds, shape, batches)


def _log(run, round_number, number, samples, stopped, total: Sums, done, seconds, shape, batches):
    """Metrics of one step (spec 8.6 and design 7)."""
    count = float(total.tokens)
    tokens = int(sum(len(s.response) for s in samples))
    values = {
        "loss": float(total.loss),
        "kl": (float(total.kl), count),
        "mass_topk": (float(total.mass), count),
        "student_entropy": (float(total.student_entropy), count),
        "teacher_entropy": (float(total.teacher_entropy), count),
        "grad_norm": float(done.grad_norm),
        "skipped": float(done.skipped),
        "prefixes": float(len(samples)),
        "response_tokens": (tokens - stopped, len(samples)),
        "cut_off": (len(samples) - stopped, len(samples)),
        "micro_batches": float(len(batches)),
    }
    settings = run.config.consolidate
    if settings.mode == "on_policy" and settings.temperature == run.config.loss.temperature:
        values["log_prob_gap"] = (float(total.log_prob_gap), count)
    read_tokens = sum(s.student_length + s.teacher_length for s in samples)
    slots = 2 * shape.rows * shape.tokens * len(batches)
    timing = {
        "rollout_seconds": seconds["rollout"],
        "update_seconds": seconds["update"],
        "response_tokens_per_second": tokens / max(seconds["rollout"], 1e-9),
        "trained_tokens_per_second": read_tokens / max(seconds["update"], 1e-9),
        "packing": read_tokens / slots,
    }
    run.metrics.scalars("consolidate", number, values, round=round_number, time_values=timing)
    if done.skipped:
        print(f"step {number}: the gradient norm is not finite; the update was skipped")
    return {"loss": float(total.loss), "response_tokens": (tokens - stopped) / len(samples)}


def _report(run: Run, round_number: int, teacher: Teacher) -> None:
    """A short table: how the loss moved, and what the prefix cache held."""
    rows = [
        row["values"] | {"step": row["step"]}
        for row in read_metrics(run.workdir.metrics_file)
        if (row["stage"], row["round"]) == ("consolidate", round_number)
    ]
    shown = [rows[0], rows[len(rows) // 2], rows[-1]] if len(rows) > 2 else rows
    columns = {  # shown name -> metric, digits after the point
        "loss": ("loss", 4),
        "top-k mass": ("mass_topk", 5),
        "entropy": ("student_entropy", 4),
        "tokens/answer": ("response_tokens", 1),
        "gradient norm": ("grad_norm", 3),
    }
    print(
        table(
            [
                [
                    row["step"],
                    *(f"{float(row[key]):.{digits}f}" for key, digits in columns.values()),
                ]
                for row in shown
            ],
            ["step", *columns],
        )
    )
    held = teacher.encoded
    if held:
        print(
            f"the teacher read {len(held)} knowledge text(s) once, "
            f"{sum(len(p.ids) for p in held)} tokens kept as {cache_bytes(held) / 1e6:.1f} MB"
        )
