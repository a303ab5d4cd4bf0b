"""Server side: knowledge into weights (paper Eq. 2, spec section 8).

Per step: all decision points of 64 games, one context drawn for each; the student answers without
it, the frozen teacher P_r re-reads the answer with it, and the student's top-k reverse KL is
minimised by one AdamW update. Nothing here touches a game. The baselines (`consolidate.mode`) take
the answers from demonstrations instead, see `rollouts`; what may keep many rounds stable
(retention, chosen turns, a moving teacher, guards) is off unless the config asks for it.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from oel_jax.base import preemption
from oel_jax.base.files import write_json
from oel_jax.config.choices import chosen_loss
from oel_jax.data.trajectories import decision_points
from oel_jax.data.trajectory_files import TrajectoryStore
from oel_jax.distill.aggregation import sample_weights
from oel_jax.distill.lora import Lora, adapted, fresh_adapter, merged, save_adapter
from oel_jax.distill.optimizer import make_optimizer
from oel_jax.distill.packing import Sample, fill, plan
from oel_jax.distill.step import (
    PLACES,
    StepConfig,
    Sums,
    averaged,
    cast,
    update,
    zeros_like,
)
from oel_jax.distill.topk_kl import KLConfig, pick_support
from oel_jax.learner import guards
from oel_jax.learner.contexts import contexts_of_round, own_contexts
from oel_jax.learner.memory import Accumulator, used
from oel_jax.learner.rollouts import (
    Step,
    common_beginning,
    demonstrator_samples,
    episodes_of_step,
    student_samples,
)
from oel_jax.learner.selection import moved, selected
from oel_jax.learner.teacher import Teacher, cache_bytes
from oel_jax.models import hub
from oel_jax.models.config import ModelConfig
from oel_jax.models.huggingface import save_model
from oel_jax.models.language_model import DTYPES
from oel_jax.parallel import processes
from oel_jax.parallel.lookout import Lookout
from oel_jax.parallel.mesh import device_bytes, on_host, put_batch
from oel_jax.parallel.offload import parts, to_device, to_host
from oel_jax.runs.checkpoints import RoundCheckpoints
from oel_jax.runs.console import Progress, waiting
from oel_jax.runs.keys import generation_key
from oel_jax.runs.metrics import mean_values, table
from oel_jax.runs.metrics import read as read_metrics
from oel_jax.runs.policies import load_policy, policy_directory, sampler_params
from oel_jax.runs.profiling import StepTrace
from oel_jax.runs.samplers import build_sampler, layout
from oel_jax.runs.session import Run
from oel_jax.runs.workdir import Workdir
from oel_jax.sampler.requests import Sampling
from oel_jax.sampler.sampler import Sampler


@dataclass
class _Student:
    """Float32 masters (or an adapter) and optimizer state; `step` updates are done.

    `teacher`: float32 weights of a teacher that follows the student, else None.
    """

    params: Any
    state: Any
    step: int
    teacher: Any = None

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        kept = {"params": self.params, "state": self.state}
        return kept if self.teacher is None else kept | {"teacher": self.teacher}


@dataclass(frozen=True)
class _Round:
    """What stays the same through a round's steps."""

    run: Run
    number: int
    teacher: Teacher
    store: TrajectoryStore
    beginning: tuple[int, ...]
    sampler: Sampler
    step: StepConfig
    add: Accumulator
    tx: Any
    progress: Progress
    lookout: Lookout


def consolidate(run: Run, round_number: int) -> list[Path]:
    """Train P_r into P_{r+1}; returns the files. Resumes from the last checkpoint."""
    config, settings = run.config, run.config.consolidate
    directory = policy_directory(config, run.workdir, round_number)
    teacher_model = load_policy(
        config, directory, run.mesh, today=run.today, dtype=settings.teacher_dtype
    )
    teacher = Teacher(
        teacher_model,
        contexts_of_round(config, run.workdir, round_number, teacher_model.tokenizer),
        thinking=config.model.thinking,
        block=config.model.attention_block,
    )
    # Which prompts a cached prefix is made from must not depend on where a run resumes.
    store = TrajectoryStore(run.workdir.trajectories(round_number))
    games = [stored.trajectory for stored in episodes_of_step(config, store, "deploy", 1)]
    first, own = decision_points(games), own_contexts(config, games, teacher_model.tokenizer)
    beginning = common_beginning(first)
    tx = make_optimizer(settings)
    step_config = static_settings(config, teacher_model.cfg)
    label = f"round {round_number} consolidate"
    traces = run.workdir.tensorboard
    with _checkpoints(config, run.workdir, round_number) as checkpoints, jax.set_mesh(run.mesh):
        student = _start(run, round_number, tx, checkpoints)
        run.metrics.rewind("consolidate", round_number, student.step)
        sizes = layout(
            config,
            run.host.shape["fsdp"],
            prompt=config.sampler.max_prompt,
            response=config.sampler.max_response,
            texts=1 if beginning else 0,
            shared=len(beginning),
        )
        how = Sampling(settings.temperature)
        sampler = build_sampler(config, teacher_model, run.host, how, sizes)
        some = first[:16]
        with waiting(f"{label}: the teacher reads the texts"):
            teacher.prepare([each.dialogue for each in some], [own[each.episode] for each in some])
        _follow(run.config, student, teacher)
        add = Accumulator(step_config, _held(config, student, teacher, sampler))
        with (
            StepTrace(run.config.profile, traces) as trace,
            Progress(
                settings.steps,
                "steps",
                label,
                every=config.log.console_every,
                done=student.step,
            ) as progress,
        ):
            progress.follow(tokens=lambda: sampler.written)
            this = _Round(
                run,
                round_number,
                teacher,
                store,
                beginning,
                sampler,
                step_config,
                add,
                tx,
                progress,
                Lookout(),
            )
            stopped, number = None, student.step
            watch = guards.Guard(config, run.workdir.metrics_file)
            while student.step < settings.steps and not stopped:
                trace.before(student.step + 1)
                try:
                    values = _step(this, student)
                except preemption.Preempted:  # before the update: the step is done again
                    student.step = number
                    _put_away(run.config, student)
                    _save_and_stop(this, student, checkpoints)
                number = student.step
                preemption.hold_until_saved()
                trace.after(number)
                stopped = watch.broken(number, values)
                if stopped:
                    break
                if student.step in config.evaluate.steps and student.step < settings.steps:
                    _export(this, student, run.workdir.policy_at(round_number, student.step))
                if processes.any_says(preemption.noticed()):
                    _save_and_stop(this, student, checkpoints)
                if number < settings.steps and checkpoints.due(number):
                    checkpoints.save(number, student.saved())
                progress.say("")
                progress.update(note=_note(values))
        checkpoints.wait()
        files = [run.workdir.policy(round_number)]
        if stopped:
            student = _last_good(run, round_number, tx, checkpoints, stopped.step)
            files.append(_stop(run.workdir, round_number, stopped, student.step))
        with waiting(f"{label}: saving the policy"):
            _export(this, student, files[0])
        if step_config.lora:
            files.append(_export_adapter(this, student))
        if processes.is_first():
            _report(config, run.workdir, round_number, teacher)
        if add.temporaries:
            print(f"memory: {add.predicted / 1e9:.2f} GB predicted for a step; {used()}")
    steps = [run.workdir.policy_at(round_number, step) for step in config.evaluate.steps]
    return files + [policy for policy in steps if policy.exists()]


def _note(values: Mapping[str, float]) -> str:
    """What the progress line says of a step, which may have had nothing to learn from."""
    answers = values.get("response_tokens")
    said = [] if answers is None else [f"{answers:.1f} tokens/answer"]
    said.append(f"loss {values['loss']:.4f}" if "loss" in values else "nothing to learn")
    return ", ".join(said)


def loss_settings(config: ml_collections.ConfigDict) -> KLConfig:
    """The loss that a config asks for, see `chosen_loss`."""
    loss = config.loss
    return KLConfig(
        loss.top_k,
        loss.temperature,
        *chosen_loss(config),
        chunk=loss.chunk,
        pick=pick_support(config.negative_control),
    )


def static_settings(config: ml_collections.ConfigDict, cfg: ModelConfig) -> StepConfig:
    """The static part of a step, for a model of shape `cfg`."""
    settings, lora = config.consolidate, Lora.of(config.lora)
    return StepConfig(
        model=cfg,
        kl=loss_settings(config),
        dtype=DTYPES[config.model.dtype],
        remat=settings.remat,
        block=config.model.attention_block,
        retention=settings.retention,
        retention_weight=settings.retention_weight,
        trust=settings.teacher_rate if settings.teacher == "trust_region" else 0.0,
        lora=lora.scale if lora else 0.0,
    )


def _weights(this: _Round, student: _Student) -> Any:
    """What the student computes with, in the compute dtype: a copy where that is not float32, or
    with LoRA the teacher's own arrays and the adapter."""
    if this.step.lora:
        base = this.teacher.model.params
        return adapted(base, student.params, this.step.lora, this.step.dtype)
    return cast(student.params, this.step.dtype)


def _export(this: _Round, student: _Student, policy: Path) -> None:
    """Write the student as a model: rounded to bfloat16 as in the released code (spec 8.2)."""
    run, model = this.run, this.teacher.model
    if processes.is_first() and policy.exists():  # by a run that was killed before it recorded it
        shutil.rmtree(policy)
    saved = jnp.float32 if run.config.consolidate.keep_fp32_master else jnp.bfloat16
    params, lora = to_device(student.params), Lora.of(run.config.lora)
    if lora:
        params = merged(model.params, params, lora)
    save_model(policy, model.cfg, params, source=model.directory, dtype=saved)


def _export_adapter(this: _Round, student: _Student) -> Path:
    """Write the adapter beside the policy that it is merged into, as PEFT reads it."""
    run, directory = this.run, this.run.workdir.adapter(this.number)
    if processes.is_first() and directory.exists():
        shutil.rmtree(directory)
    base = policy_directory(run.config, run.workdir, this.number)
    lora = Lora.of(run.config.lora)
    cfg, (name, commit) = this.teacher.model.cfg, hub.lasting_name(run.config.model.path, base)
    save_adapter(directory, cfg, student.params, lora, base=name, revision=commit)
    return directory


def _last_good(
    run: Run, round_number: int, tx: Any, checkpoints: RoundCheckpoints, step: int
) -> _Student:
    """The newest checkpoint whose weights a step before `step` has found good, or P_r."""
    checkpoints.drop_after(step - 2)
    return _start(run, round_number, tx, checkpoints)


def _save_and_stop(this: _Round, student: _Student, checkpoints: RoundCheckpoints) -> NoReturn:
    """After a notice: the last finished step to disk."""
    number, steps = student.step, this.run.config.consolidate.steps
    if number:
        checkpoints.save(number, student.saved())
        checkpoints.wait()
    raise preemption.Preempted(f"round {this.number}: optimizer step {number} of {steps} is kept")


def _stop(workdir: Workdir, round_number: int, broken: guards.Broken, kept: int) -> Path:
    """Say and record that a guard ended the round."""
    file = workdir.guard_file(round_number)
    if processes.is_first():
        write_json(file, asdict(broken) | {"kept_step": kept})
    what = f"the weights of step {kept}" if kept else "the weights the round began with"
    print(f"GUARD: round {round_number} is stopped. {broken}; kept: {what} (config.guard)")
    return file


def _follow(config: ml_collections.ConfigDict, student: _Student, teacher: Teacher) -> None:
    """Give the teacher the averaged weights, if there are any."""
    if student.teacher is not None:
        dtype = config.consolidate.teacher_dtype or config.model.dtype
        teacher.refresh(cast(student.teacher, DTYPES[dtype]))


def _held(
    config: ml_collections.ConfigDict, student: _Student, teacher: Teacher, sampler: Sampler
) -> dict[str, int]:
    """Bytes of one device that live through an optimizer step, by name."""
    name = "adapter, float32" if config.lora.rank else "student, float32"
    away = parts(config.consolidate)
    held = {
        name: device_bytes(student.params),
        "AdamW's moments": 0 if "optimizer" in away else device_bytes(student.state),
        "gradients, float32": device_bytes(student.params),
        "teacher": device_bytes(teacher.model.params),
        "knowledge, encoded": device_bytes([prefix.cache for prefix in teacher.encoded]),
        "rollout cache": sampler.bytes,
    }
    if student.teacher is not None:
        held["teacher's average, float32"] = device_bytes(student.teacher)
    return held


def _checkpoints(
    config: ml_collections.ConfigDict, workdir: Workdir, round_number: int
) -> RoundCheckpoints:
    settings = config.consolidate
    return RoundCheckpoints(
        workdir.checkpoints(round_number),
        every=settings.save_every,
        minutes=settings.save_minutes,
        keep=2 if guards.watches(config) else 1,  # the newest may not be good
    )


def _start(run: Run, round_number: int, tx: Any, checkpoints: RoundCheckpoints) -> _Student:
    """What is trained, with a fresh optimizer, or the last checkpoint of this round.

    That is float32 masters of P_r, or with LoRA an adapter that changes nothing yet.
    """
    config, lora, average = run.config, Lora.of(run.config.lora), None
    source = policy_directory(config, run.workdir, round_number)
    if lora:
        cfg = ModelConfig.from_directory(source)
        key = generation_key(config, "lora", round_number)
        params = fresh_adapter(cfg, lora, run.mesh, key)
    else:
        model = load_policy(config, source, run.mesh, today=run.today, dtype="float32")
        params = model.params
    if config.consolidate.teacher == "ema":
        average = jax.tree.map(jnp.copy, params)
    student = _Student(params, jax.jit(tx.init)(params), 0, average)
    _put_away(run.config, student)
    latest = processes.from_first(max(checkpoints.steps, default=0))
    if not latest:
        return student
    saved = checkpoints.restore(latest, student.saved())
    print(f"resuming from optimizer step {latest}")
    return _Student(saved["params"], saved["state"], latest, saved.get("teacher"))


def _put_away(config: ml_collections.ConfigDict, student: _Student) -> None:
    """Into host memory with what is not needed until the next micro-batches or update."""
    away = parts(config.consolidate)
    if "masters" in away:
        student.params = to_host(student.params)
    if "optimizer" in away:
        student.state = to_host(student.state)


def _step(this: _Round, student: _Student) -> dict[str, float]:
    """One optimizer step: rollouts, teacher and student on packed micro-batches, update.

    A step whose samples are all left out (by `drop_remainder`, or by `turn_floor`) changes no
    weight. It is logged like any other, without the numbers that it does not have.
    """
    run, teacher, settings = this.run, this.teacher, this.run.config.consolidate
    number, began = student.step + 1, time.monotonic()
    if settings.mode == "on_policy":
        if "teacher" in parts(settings):
            teacher.model.params = to_host(teacher.model.params)
        this.progress.say("the student answers")
        # Nothing here holds on to these weights: in bfloat16 they are a copy that has to go.
        episodes = episodes_of_step(run.config, this.store, "deploy", number)
        samples, stopped = student_samples(
            run.config,
            Step(this.number, number),
            episodes,
            sampler_params(run.config, on_host(_weights(this, student), run.mesh, run.host)),
            teacher,
            this.beginning,
            this.sampler,
        )
        teacher.model.params = to_device(teacher.model.params)
    else:
        episodes = episodes_of_step(run.config, this.store, "demonstrate", number)
        samples, stopped = demonstrator_samples(
            run.config, Step(this.number, number), episodes, teacher
        )
    rolled_out = time.monotonic()
    made, values = samples, {}
    if samples and (settings.turn_fraction < 1 or settings.turn_floor > 0):
        samples, values = _choose(this, samples)
    timing = {"rollout_seconds": rolled_out - began}
    lengths = [len(sample.response) for sample in made]
    values |= {
        "prefixes": float(len(made)),
        "response_tokens": (sum(lengths) - stopped, len(made)),
        "cut_off": (len(made) - stopped, len(made)),
    }
    student.step = number
    if samples:
        trained, slots = _train(this, student, samples)
        values |= trained
        seconds = time.monotonic() - rolled_out
        read_tokens = sum(s.student_length + s.teacher_length for s in samples)
        timing["update_seconds"] = seconds
        timing["trained_tokens_per_second"] = read_tokens / max(seconds, 1e-9)
        timing["packing"] = read_tokens / slots
    timing["response_tokens_per_second"] = sum(lengths) / max(timing["rollout_seconds"], 1e-9)
    if lengths:
        run.metrics.histogram("response_tokens", number, lengths, "consolidate", this.number)
    run.metrics.scalars("consolidate", number, values, round=this.number, time_values=timing)
    return mean_values(values)


def _train(
    this: _Round, student: _Student, samples: Sequence[Sample]
) -> tuple[dict[str, Any], int]:
    """Update the student (and a teacher that follows it) by these samples.

    Returns:
      metrics (spec 8.6), and how many tokens the micro-batches had room for.
    """
    run, teacher, settings = this.run, this.teacher, this.run.config.consolidate
    shape, batches = plan(samples, settings.token_budget, run.mesh.shape["fsdp"])
    how = run.config.loss.aggregation
    weights = sample_weights(samples, how, released_gpus=settings.drop_remainder)
    student.params = to_device(student.params)
    gradients = zeros_like(student.params)
    total, reader, own = None, None, {}
    if this.step.own_view:
        reader = _weights(this, student)
    for index, (text, rows) in enumerate(batches, 1):
        this.progress.say(f"micro-batch {index} of {len(batches)}")
        filled = fill(samples, weights, rows, shape, run.config.sampler.max_response, PLACES)
        if reader is not None and text not in own:
            own = {text: teacher.read_by(reader, text)}  # batches come text by text: one is held
        inputs = (student.params, teacher.model.params, teacher.prefix(text).cache)
        batch = put_batch(run.mesh, filled)
        gradients, sums = this.add(gradients, *inputs, batch, own.get(text))
        this.lookout.after(sums)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    student.params, student.state, done = update(
        student.params, student.state, gradients, tx=this.tx, clip_norm=settings.clip_norm
    )
    if student.teacher is not None:
        rate = settings.teacher_rate
        student.teacher = averaged(student.teacher, student.params, rate=rate)
        _follow(run.config, student, teacher)
    _put_away(run.config, student)
    total, done = jax.device_get((total, done))
    if done.skipped:
        print(f"step {student.step}: the gradient norm is not finite; the update was skipped")
    _show_places(this, student.step, total)
    count = float(total.tokens)
    values = {
        "loss": float(total.loss),
        "kl": (float(total.kl), count),
        "mass_topk": (float(total.mass), count),
        "student_entropy": (float(total.student_entropy), count),
        "teacher_entropy": (float(total.teacher_entropy), count),
        "grad_norm": float(done.grad_norm),
        "skipped": float(done.skipped),
        "micro_batches": float(len(batches)),
    }
    if settings.mode == "on_policy" and settings.temperature == run.config.loss.temperature:
        values["log_prob_gap"] = (float(total.log_prob_gap), count)
    if this.step.retention != "none":
        values["retention_kl"] = (float(total.retention), count)
    return values, 2 * shape.rows * shape.tokens * len(batches)


def _choose(this: _Round, samples: list[Sample]) -> tuple[list[Sample], dict[str, Any]]:
    """The turns where knowledge moves the teacher most, and numbers about them."""
    settings = this.run.config.consolidate
    scores = moved(
        samples, this.teacher, this.step, settings.token_budget, this.run.mesh, this.lookout
    )
    chosen = selected(scores, settings.turn_fraction, settings.turn_floor)
    values = {
        "sensitivity": float(scores.mean()),
        "sensitivity_chosen": (float(scores[chosen].sum()), len(chosen)),
        "chosen": float(len(chosen)),
    }
    return [samples[index] for index in chosen], values


def _show_places(this: _Round, number: int, total: Sums) -> None:
    """In TensorBoard: where in the answers student and teacher differ."""
    width = this.run.config.sampler.max_response / PLACES
    ends = [width * (place + 1) for place in range(PLACES)]
    kl = total.kl_by_place / np.maximum(total.tokens_by_place, 1)
    this.run.metrics.bars("kl_by_place", number, ends, kl, "consolidate", this.number)


def _report(
    config: ml_collections.ConfigDict, workdir: Workdir, round_number: int, teacher: Teacher
) -> None:
    """A short table: how the loss moved, and what the prefix cache held."""
    rows = [
        row["values"] | {"step": row["step"]}
        for row in read_metrics(workdir.metrics_file)
        if (row["stage"], row["round"]) == ("consolidate", round_number)
    ]
    idle = sum("loss" not in row for row in rows)
    if idle:
        c = config.consolidate
        print(
            f"{idle} of {len(rows)} steps had nothing to learn from and changed no weight: "
            f"config.consolidate.drop_remainder={c.drop_remainder}, turn_floor={c.turn_floor:g}"
        )
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
                    *(
                        f"{float(row[key]):.{digits}f}" if key in row else "-"
                        for key, digits in columns.values()
                    ),
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
