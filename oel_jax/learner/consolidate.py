"""Server side: knowledge into weights (paper Eq. 2, spec section 8).

Per step: all decision points of 64 games, one context drawn for each; the student answers without
it, the frozen teacher P_r re-reads the answer with it, and the student's top-k reverse KL is
minimised by one AdamW update. Nothing here touches a game. The baselines (`consolidate.mode`) take
the answers from demonstrations instead, see `rollouts`; what may keep many rounds stable
(retention, chosen turns, a moving teacher, guards) is off unless the config asks for it.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import ml_collections
import optax

from oel_jax.base import preemption
from oel_jax.base.files import write_json
from oel_jax.data.messages import Context
from oel_jax.data.trajectories import DecisionPoint
from oel_jax.data.trajectory_files import TrajectoryStore
from oel_jax.distill.aggregation import sample_weights
from oel_jax.distill.optimizer import make_optimizer
from oel_jax.distill.packing import Sample, fill, plan
from oel_jax.distill.step import PLACES, StepConfig, averaged, cast, update, zeros_like
from oel_jax.learner import guards
from oel_jax.learner.contexts import contexts_of_round
from oel_jax.learner.memory import (
    compile_step,
    held_bytes,
    memory_table,
    peak_memory,
    signature,
)
from oel_jax.learner.rollouts import (
    Step,
    common_beginning,
    demonstrator_samples,
    episodes_of_step,
    student_samples,
)
from oel_jax.learner.selection import moved, selected
from oel_jax.learner.settings import step_settings
from oel_jax.learner.step_log import Measured, StepLog, Trained, print_round
from oel_jax.learner.student import (
    TrainState,
    begin,
    compute_weights,
    last_good,
    put_away,
    round_checkpoints,
    save_policy,
    save_round_adapter,
)
from oel_jax.learner.teacher import Teacher
from oel_jax.learner.turn_contexts import points_to_learn
from oel_jax.models.language_model import DTYPES
from oel_jax.parallel import processes
from oel_jax.parallel.lookout import Lookout
from oel_jax.parallel.mesh import gather_to_host, put_batch
from oel_jax.parallel.offload import delete_on_host, offloaded_parts, to_device
from oel_jax.runs.checkpoints import RoundCheckpoints
from oel_jax.runs.console import Progress, waiting
from oel_jax.runs.policies import load_policy, policy_directory, sampler_params
from oel_jax.runs.profiling import StepTrace
from oel_jax.runs.samplers import build_sampler, layout
from oel_jax.runs.session import Run
from oel_jax.runs.workdir import Workdir
from oel_jax.sampler.requests import Sampling
from oel_jax.sampler.sampler import Sampler


class _Episodes(NamedTuple):
    """The round's trajectories, and what is made of those of the first step.

    Which prompts a cached prefix is made from must not depend on where a run resumes.
    """

    store: TrajectoryStore
    first: Sequence[DecisionPoint]
    own: Sequence[Context | None]  # of each of these points
    beginning: tuple[int, ...]


@dataclass(frozen=True)
class _Round:
    """What stays the same through a round's steps."""

    run: Run
    number: int
    teacher: Teacher
    episodes: _Episodes
    sampler: Sampler
    step: StepConfig
    tx: optax.GradientTransformationExtraArgs
    held: Mapping[str, int]
    progress: Progress
    log: StepLog
    lookout: Lookout = field(default_factory=Lookout)
    programs: dict[Hashable, tuple[jax.stages.Compiled, int]] = field(default_factory=dict)

    @property
    def temporaries(self) -> int:
        """Bytes of a device that the hungriest of the step's programs needs for temporaries."""
        return max((size for _, size in self.programs.values()), default=0)


def consolidate(run: Run, round_number: int) -> list[Path]:
    """Train P_r into P_{r+1}; returns the files. Resumes from the last checkpoint."""
    config, workdir = run.config, run.workdir
    label = f"round {round_number} consolidate"
    teacher, tx = _load_teacher(run, round_number), make_optimizer(config.consolidate)
    episodes = _read_episodes(run, round_number, teacher)
    checkpoints = round_checkpoints(config, workdir, round_number)
    with checkpoints, jax.set_mesh(run.mesh):
        state = begin(run, round_number, tx, checkpoints)
        run.metrics.rewind("consolidate", round_number, state.step)
        this = _prepare(run, round_number, teacher, episodes, tx, state)
        state, broken = _train_steps(this, state, checkpoints)
        checkpoints.wait()
        files = [workdir.policy(round_number)]
        if broken:
            state = last_good(run, round_number, tx, checkpoints, broken)
            files.append(_record_guard(workdir, round_number, broken, state.step))
        with waiting(f"{label}: saving the policy"):
            save_policy(run, teacher.model, state, files[0])
        if this.step.lora:
            files.append(save_round_adapter(run, round_number, teacher.model, state))
        if processes.is_first():
            print_round(config, workdir.metrics_file, round_number, teacher.encoded)
        if this.programs:
            needed = (sum(this.held.values()) + this.temporaries) / 1e9
            print(f"memory: {needed:.2f} GB predicted for a step; {peak_memory()}")
    steps = [workdir.policy_at(round_number, step) for step in config.evaluate.steps]
    return files + [policy for policy in steps if policy.exists()]


# --- before the first step ------------------------------------------------------------------------


def _load_teacher(run: Run, round_number: int) -> Teacher:
    config = run.config
    directory = policy_directory(config, run.workdir, round_number)
    dtype = config.consolidate.teacher_dtype
    model = load_policy(config, directory, run.mesh, today=run.today, dtype=dtype)
    contexts = contexts_of_round(config, run.workdir, round_number, model.tokenizer)
    block = config.model.attention_block
    return Teacher(model, contexts, thinking=config.model.thinking, block=block)


def _read_episodes(run: Run, round_number: int, teacher: Teacher) -> _Episodes:
    store = TrajectoryStore(run.workdir.trajectories(round_number))
    some = episodes_of_step(run.config, store, "deploy", 1)
    tokenizer = teacher.model.tokenizer
    first, own = points_to_learn(run.config, run.workdir, round_number, some, tokenizer)
    return _Episodes(store, first, own, common_beginning(first))


def _prepare(
    run: Run,
    round_number: int,
    teacher: Teacher,
    episodes: _Episodes,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
) -> _Round:
    """The sampler's caches, the teacher's texts, and all that a step needs in addition."""
    config, settings, label = (
        run.config,
        run.config.consolidate,
        f"round {round_number} consolidate",
    )
    sizes = layout(
        config,
        run.host.shape["fsdp"],
        prompt=config.sampler.max_prompt,
        response=config.sampler.max_response,
        texts=1 if episodes.beginning else 0,
        shared=len(episodes.beginning),
    )
    how = Sampling(settings.temperature)
    sampler = build_sampler(config, teacher.model, run.host, how, sizes)
    with waiting(f"{label}: the teacher reads the texts"):
        some = episodes.first[:16]
        teacher.prepare([point.dialogue for point in some], episodes.own[: len(some)])
    _follow(config, state, teacher)
    every = config.log.console_every
    progress = Progress(settings.steps, "steps", label, every=every, done=state.step)
    return _Round(
        run,
        round_number,
        teacher,
        episodes,
        sampler,
        step_settings(config, teacher.model.cfg),
        tx,
        held_bytes(config, state, teacher, sampler),
        progress,
        StepLog(config, round_number, run.metrics, progress),
    )


# --- the steps ------------------------------------------------------------------------------------


def _train_steps(
    this: _Round, state: TrainState, checkpoints: RoundCheckpoints
) -> tuple[TrainState, guards.Broken | None]:
    """All steps of the round that are left; and what left its band, if that ended the round.

    Where guards watch, the numbers of a step are fetched at once: the next step is not begun before
    they are judged. Otherwise they are fetched while the next one runs, see `StepLog`.
    """
    config, workdir, last = this.run.config, this.run.workdir, this.run.config.consolidate.steps
    watch, watched = guards.Guard(config, workdir.metrics_file), guards.watches(config)
    with StepTrace(config.profile, workdir.tensorboard) as trace, this.progress:
        this.progress.follow(tokens=lambda: this.sampler.written)
        while state.step < last:
            trace.before(state.step + 1)
            try:
                state = _step(this, state)
            except preemption.Preempted:  # before the update: the step is done again
                _save_and_stop(this, state, checkpoints)
            preemption.hold_until_saved()
            values = this.log.flush() if watched or trace.running else {}
            trace.after(state.step)
            if watched and (broken := watch.broken(state.step, values)):
                return state, broken
            if state.step in config.evaluate.steps and state.step < last:
                inside = workdir.policy_at(this.number, state.step)
                save_policy(this.run, this.teacher.model, state, inside)
            if processes.any_says(preemption.noticed()):
                _save_and_stop(this, state, checkpoints)
            if state.step < last and checkpoints.due(state.step):
                this.log.flush()
                checkpoints.save(state.step, state.saved())
            this.progress.say("")
        this.log.flush()
    return state, None


def _step(this: _Round, state: TrainState) -> TrainState:
    """One optimizer step: rollouts, teacher and student on packed micro-batches, update.

    A step whose samples are all left out (by `drop_remainder`, or by `turn_floor`) changes no
    weight. It is logged like any other, without the numbers that it does not have.
    """
    settings, number, began = this.run.config.consolidate, state.step + 1, time.monotonic()
    samples, stopped = _samples(this, state)
    answered = time.monotonic()
    lengths = [len(sample.response) for sample in samples]
    values: dict[str, Any] = {}
    made = len(samples)
    if samples and (settings.turn_fraction < 1 or settings.turn_floor > 0):
        samples, values = _choose(this, samples)
    values |= {
        "prefixes": float(made),
        "response_tokens": (sum(lengths) - stopped, made),
        "cut_off": (made - stopped, made),
    }
    trained = None
    if samples:
        state, trained = _train(this, state, samples)
    this.log.add(Measured(number, values, lengths, began, answered, trained))
    return replace(state, step=number)


def _samples(this: _Round, state: TrainState) -> tuple[list[Sample], int]:
    """The answers that a step learns from, and how many of them stopped by themselves."""
    run, teacher, config = this.run, this.teacher, this.run.config
    step = Step(this.number, state.step + 1)
    if config.consolidate.mode != "on_policy":
        episodes = episodes_of_step(config, this.episodes.store, "demonstrate", step.number)
        return demonstrator_samples(config, step, episodes, teacher)
    this.progress.say("the student answers")
    away = "teacher" in offloaded_parts(config.consolidate)
    with teacher.in_host_memory() if away else nullcontext():
        episodes = episodes_of_step(config, this.episodes.store, "deploy", step.number)
        # Nothing here holds on to these weights: in bfloat16 they are a copy that has to go.
        return student_samples(
            config,
            step,
            episodes,
            sampler_params(
                config,
                gather_to_host(
                    compute_weights(state, teacher.model.params, this.step), run.mesh, run.host
                ),
            ),
            teacher,
            this.episodes.beginning,
            this.sampler,
            run.workdir,
            this.log.flush,
        )


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


def _train(
    this: _Round, state: TrainState, samples: Sequence[Sample]
) -> tuple[TrainState, Trained]:
    """Update the student (and a teacher that follows it) by these samples.

    The state's arrays are given away where the update is dispatched; until then, where a notice may
    end the step, they stay as they are.
    """
    run, teacher, settings = this.run, this.teacher, this.run.config.consolidate
    shape, batches = plan(samples, settings.token_budget, run.mesh.shape["fsdp"])
    how = run.config.loss.aggregation
    weights = sample_weights(samples, how, released_gpus=settings.drop_remainder)
    params = to_device(state.params)
    gradients = zeros_like(params)
    total, reader, own = None, None, {}
    if this.step.own_view:
        reader = compute_weights(state, teacher.model.params, this.step)
    for index, (text, rows) in enumerate(batches, 1):
        this.progress.say(f"micro-batch {index} of {len(batches)}")
        filled = fill(samples, weights, rows, shape, run.config.sampler.max_response, PLACES)
        if reader is not None and text not in own:
            own = {text: teacher.encode_with(reader, text)}  # they come text by text: one is held
        inputs = (params, teacher.model.params, teacher.prefix(text).cache)
        inputs = (*inputs, put_batch(run.mesh, filled), own.get(text))
        gradients, sums = _program(this, gradients, inputs)(gradients, *inputs)
        this.log.flush()
        this.lookout.after(sums)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    params, optimizer, done = update(
        params, state.optimizer, gradients, tx=this.tx, clip_norm=settings.clip_norm
    )
    delete_on_host(state.params)  # the update gave away what is on the device
    average = state.average
    if average is not None:
        average = averaged(average, params, rate=settings.teacher_rate)
    state = put_away(
        run.config, replace(state, params=params, optimizer=optimizer, average=average)
    )
    _follow(run.config, state, teacher)
    tokens = sum(sample.student_length + sample.teacher_length for sample in samples)
    capacity = 2 * shape.rows * shape.tokens * len(batches)
    return state, Trained(total, done, len(batches), tokens, capacity)


def _program(this: _Round, gradients: Any, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    """`accumulate`, compiled for these shapes; a program that needs more memory is reported."""
    key = signature(inputs)
    if key not in this.programs:
        most = this.temporaries
        this.programs[key] = compile_step(this.step, gradients, *inputs)
        if this.temporaries > most:
            print(memory_table(this.held, this.temporaries, inputs[3]))
    return this.programs[key][0]


def _follow(config: ml_collections.ConfigDict, state: TrainState, teacher: Teacher) -> None:
    """Give the teacher the averaged weights, if there are any."""
    if state.average is not None:
        dtype = config.consolidate.teacher_dtype or config.model.dtype
        teacher.refresh(cast(state.average, DTYPES[dtype]))


# --- the end --------------------------------------------------------------------------------------


def _save_and_stop(this: _Round, state: TrainState, checkpoints: RoundCheckpoints) -> NoReturn:
    """After a notice: the last finished step to disk."""
    number, steps = state.step, this.run.config.consolidate.steps
    this.log.flush()
    if number:
        checkpoints.save(number, state.saved())
        checkpoints.wait()
    raise preemption.Preempted(f"round {this.number}: optimizer step {number} of {steps} is kept")


def _record_guard(workdir: Workdir, round_number: int, broken: guards.Broken, kept: int) -> Path:
    """Say and record that a guard ended the round."""
    file = workdir.guard_file(round_number)
    if processes.is_first():
        write_json(file, asdict(broken) | {"kept_step": kept})
    what = f"the weights of step {kept}" if kept else "the weights the round began with"
    print(f"GUARD: round {round_number} is stopped. {broken}; kept: {what} (config.guard)")
    return file
