"""What may keep many rounds stable: each term against its plain formula, each guard by tripping it.

The terms: trajectory-balanced weights, chosen turns, retention, a teacher that moves. The plain
side reads one sample at a time without caches and lets autodiff do the rest.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_step import (
    KL,
    close,
    make_model,
    make_samples,
    make_teacher,
    padded,
    plain_logits,
    situation,
)
from tiny_run import copy_of, go, opened, tiny_config

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.config.checks import validate
from oel_jax.distill.aggregation import sample_weights
from oel_jax.distill.packing import Sample, fill, plan
from oel_jax.distill.reference import divergence
from oel_jax.distill.step import PLACES, StepConfig, accumulate, averaged, zeros_like
from oel_jax.learner import guards
from oel_jax.learner.selection import moved, selected
from oel_jax.models import bundled
from oel_jax.nano import skills
from oel_jax.parallel.mesh import make_mesh, put_batch
from oel_jax.runs.metrics import read_metrics

PROMPTS = [situation(f"Board {'H' * (n % 5)}G{n}\n") for n in range(12)]
TERMS = {
    "plain retention": {"retention": "plain", "retention_weight": 0.3},
    "retention with knowledge": {"retention": "knowledge", "retention_weight": 0.3},
    "trust region": {"trust": 0.25},
    "both": {"trust": 0.25, "retention": "knowledge", "retention_weight": 0.7},
}


def step_of(mesh, samples, student, teacher, step: StepConfig):
    """Gradient, loss and retention of a step as `consolidate` does it."""
    shape, batches = plan(samples, 2000, mesh.shape["fsdp"])
    weights = sample_weights(samples, "token_mean")
    with jax.set_mesh(mesh):
        gradients, loss, kept = zeros_like(student.params), 0.0, 0.0
        for text, rows in batches:
            batch = put_batch(mesh, fill(samples, weights, rows, shape))
            own = teacher.encode_with(student.params, text) if step.own_view else None
            cache = teacher.prefix(text).cache
            gradients, sums = accumulate(
                gradients, student.params, teacher.model.params, cache, batch, own, step=step
            )
            loss, kept = loss + float(sums.loss), kept + float(sums.retention)
    return loss, jax.device_get(gradients), kept


@pytest.fixture(scope="module")
def few():
    """Two sides, and samples small enough for the plain one; module scope: made once."""
    student, teacher = make_model(0), make_teacher()
    samples = make_samples(teacher, PROMPTS)[:5]
    return student, teacher, samples, PROMPTS[:5]


@partial(jax.jit, static_argnames=("cfg", "terms"))
def plain_sample(params, mine, theirs, cfg, terms, short, long, at_short, at_long, mask):
    """Loss of one sample from whole sequences; `mine`: the student's weights as constants.

    The student's knowledge prefix is a constant, so where its own view has a gradient, `params`
    read the part after the prefix only: done by the caller with `Prefix`-free finite differences.
    """
    terms = dict(terms)
    s = plain_logits(cfg, params, short)[at_short]
    t = plain_logits(cfg, theirs, long)[at_long]
    own = plain_logits(cfg, mine, long)[at_long]
    trust = terms.get("trust", 0.0)
    aim = (1 - trust) * t + trust * own
    loss = jnp.sum(divergence(s, aim, top_k=KL.top_k, temperature=KL.temperature) * mask)
    kept = 0.0
    if terms.get("retention") == "plain":
        base = plain_logits(cfg, theirs, short)[at_short]
        kept = divergence(s, base, top_k=KL.top_k, temperature=KL.temperature)
    elif terms.get("retention") == "knowledge":
        kept = divergence(own, t, top_k=KL.top_k, temperature=KL.temperature)
    kept = jnp.sum(kept * mask)
    return loss + terms.get("retention_weight", 0.0) * kept, kept


def plain_step(student, teacher, samples, prompts, terms):
    tokens = sum(len(s.response) for s in samples)
    mine, theirs = (jax.device_get(m.params) for m in (student, teacher.model))
    loss, kept, gradient = 0.0, 0.0, jax.tree.map(np.zeros_like, mine)
    for sample, prompt in zip(samples, prompts, strict=True):
        long_prompt = teacher.prompt(sample.knowledge, prompt)
        long, short = [*long_prompt, *sample.response], [*sample.prompt, *sample.response]
        n, count = len(sample.response), np.arange(20)
        mask = (count < n).astype(np.float32)
        at = [np.minimum(len(p) - 1 + count, len(p) + n - 2) for p in (sample.prompt, long_prompt)]
        inputs = (padded(short), padded(long), *at, mask)
        (value, term), grad = jax.value_and_grad(plain_sample, has_aux=True)(
            mine, mine, theirs, student.cfg, tuple(terms.items()), *inputs
        )
        loss, kept = loss + float(value) / tokens, kept + float(term)
        gradient = jax.tree.map(lambda a, b: a + np.asarray(b) / tokens, gradient, grad)
    return loss, gradient, kept


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
def test_terms_equal_their_plain_formula(few, name):
    student, teacher, samples, prompts = few
    step = StepConfig(student.cfg, KL, jnp.float32, "layer", 256, **TERMS[name])
    mesh = student.mesh
    loss, gradient, kept = step_of(mesh, samples, student, teacher, step)
    expected, plain_gradient, plain_kept = plain_step(*few, TERMS[name])
    assert abs(loss - expected) <= 2e-5 * abs(expected)
    assert kept == pytest.approx(plain_kept, rel=2e-5)
    if "knowledge" not in TERMS[name].get("retention", ""):  # there autodiff sees the whole text
        close(gradient, plain_gradient, 1e-4)
    without = StepConfig(student.cfg, KL, jnp.float32, "layer", 256)
    assert abs(step_of(mesh, samples, student, teacher, without)[0] - loss) > 1e-3 * abs(loss)


@pytest.mark.slow
def test_retention_with_knowledge_has_the_gradient_of_what_follows_the_prefix(few):
    """Finite differences along a direction, with the student's prefix held fixed."""
    student, teacher, samples, _ = few
    mesh, step = (
        student.mesh,
        StepConfig(student.cfg, KL, jnp.float32, "none", 256, **TERMS["both"]),
    )
    shape, batches = plan(samples, 100_000, 1)
    text, rows = batches[0]
    chosen = [i for row in rows for i in row]
    batch = put_batch(mesh, fill(samples, [1.0 / len(chosen)] * len(samples), rows, shape))
    own, cache = teacher.encode_with(student.params, text), teacher.prefix(text).cache
    keys = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(student.params))))
    direction = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), student.params)

    def shifted(epsilon):
        params = jax.tree.map(lambda p, d: p + epsilon * d, student.params, direction)
        zeros = zeros_like(params)
        with jax.set_mesh(mesh):
            inputs = (params, teacher.model.params, cache, batch, own)
            return accumulate(zeros, *inputs, step=step)

    gradient, _ = shifted(0.0)
    sides = (jax.tree.leaves(jax.device_get(tree)) for tree in (gradient, direction))
    slope = sum(float(np.vdot(g, d)) for g, d in zip(*sides, strict=True))
    h = 1e-5  # larger ones cross places where the top k change
    numeric = (float(shifted(h)[1].loss) - float(shifted(-h)[1].loss)) / (2 * h)
    assert step.own_view and abs(slope) > 1e-3
    assert numeric == pytest.approx(slope, rel=0.02)


@pytest.mark.mesh
def test_eight_devices_equal_one(few):
    student, teacher, samples, _ = few
    step = StepConfig(student.cfg, KL, jnp.float32, "layer", 256, **TERMS["both"])
    one = step_of(student.mesh, samples, student, teacher, step)
    mesh = make_mesh(2, 4, jax.devices())
    wide, wide_teacher = make_model(0, mesh), make_teacher(mesh)
    make_samples(wide_teacher, PROMPTS)  # encodes the texts
    eight = step_of(mesh, samples, wide, wide_teacher, step)
    assert abs(one[0] - eight[0]) <= 1e-5 * abs(one[0])
    close(eight[1], one[1], 1e-4)


def test_turns_are_chosen_by_how_far_knowledge_moves_the_teacher(few):
    student, teacher, samples, prompts = few
    step = StepConfig(student.cfg, KL, jnp.float32, "layer", 256)
    with jax.set_mesh(student.mesh):
        scores = moved(samples, teacher, step, 700, student.mesh)
    params, cfg = jax.device_get(teacher.model.params), teacher.model.cfg
    for sample, prompt, score in zip(samples, prompts, scores, strict=True):
        long_prompt, n = teacher.prompt(sample.knowledge, prompt), len(sample.response)
        sides = []
        for p in (sample.prompt, long_prompt):
            logits = plain_logits(cfg, params, padded([*p, *sample.response]))
            z = np.asarray(logits, np.float64)[len(p) - 1 : len(p) - 1 + n] / KL.temperature
            sides.append(np.exp(z - z.max(-1, keepdims=True)))
        a, b = (s / s.sum(-1, keepdims=True) for s in sides)
        middle = (a + b) / 2
        jsd = ((a * np.log(a / middle)).sum(-1) + (b * np.log(b / middle)).sum(-1)) / 2
        assert score == pytest.approx(jsd.mean(), rel=1e-3, abs=1e-6)
    assert selected(np.array([0.1, 0.9, 0.5, 0.9]), 0.5) == [1, 3]
    assert selected(np.array([0.5, 0.5, 0.5]), 0.3) == [0]  # the first of equals; never none
    assert selected(np.arange(10.0), 1.0) == list(range(10))
    assert selected(np.array([0.1, 0.9, 0.5]), 1.0, 0.4) == [1, 2]
    assert selected(np.array([0.1, 0.9, 0.5]), 0.3, 2.0) == []
    assert len(selected(np.arange(10.0), 0.7)) == 7  # 0.7 * 10 is a little above 7 in binary


def test_trajectory_mean_is_a_mean_of_means():
    def sample(game, tokens):
        return Sample([1], [1], 0, [5] * tokens, np.zeros(tokens), 0, game)

    samples = [sample(0, 3), sample(0, 5), sample(1, 2)]
    weights = sample_weights(samples, "trajectory_mean")
    values = np.array([1.0, 2.0, 7.0])  # the loss of every token of a sample
    expected = np.mean([(3 * 1.0 + 5 * 2.0) / 8, 7.0])
    assert sum(
        w * v * len(s.response) for w, v, s in zip(weights, values, samples, strict=True)
    ) == (pytest.approx(expected))


def test_the_average_follows_the_student():
    with jax.set_mesh(make_mesh(1, 1, jax.devices()[:1])):
        out = averaged({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 2.0])}, rate=0.25)
    np.testing.assert_allclose(out["a"], [1.5, 2.0])


def test_places_cover_an_answer():
    rows = [[0]]
    s = Sample([1], [1], 0, [5] * 48, np.zeros(48), 0)
    shape = plan([s], 4096, 1)[0]
    batch = fill([s], [1.0], rows, shape, 48, PLACES)
    place = batch.place[0, :48]
    assert place[0] == 0 and place[-1] == PLACES - 1 and (np.diff(place) >= 0).all()
    assert set(np.bincount(place, minlength=PLACES)) <= {1, 2}


# --- a real run -----------------------------------------------------------------------------------


POLICY = Path("round_001") / "policy"


def policy_bytes(work):
    return (work / POLICY / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def ready(finished_run, tmp_path_factory):
    """A run whose next stage is consolidation."""
    return copy_of(
        finished_run, tmp_path_factory.mktemp("ready") / "run", "consolidate", "evaluate"
    )


OPTIONS = {
    "average": {"consolidate__teacher": "ema", "consolidate__teacher_rate": 0.5},
    "trust": {"consolidate__teacher": "trust_region", "consolidate__teacher_rate": 0.5},
    "retention": {"consolidate__retention": "plain", "consolidate__retention_weight": 1.0},
    "privileged": {"consolidate__retention": "knowledge", "consolidate__retention_weight": 1.0},
    "turns": {"consolidate__turn_fraction": 0.4},
    "balanced": {"loss__aggregation": "trajectory_mean"},
}


@pytest.mark.e2e
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_a_run_and_resumes_to_the_bit(finished_run, ready, tmp_path, name):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for place in (whole, parts):
        shutil.copytree(ready, place)
    stages = ("consolidate",)
    go(whole, tiny_config(**OPTIONS[name]), stages=stages, change=True)
    assert policy_bytes(whole) != policy_bytes(finished_run)
    # Stopped after a step: the same files as a run that was not.
    from oel_jax.learner import consolidate as stage

    made, real = [], stage._step

    def dies(*args):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_step", dies)
        with pytest.raises(KeyboardInterrupt):
            go(parts, tiny_config(**OPTIONS[name]), stages=stages, change=True)
    go(parts, tiny_config(**OPTIONS[name]), stages=stages)
    assert policy_bytes(parts) == policy_bytes(whole)
    rows = [r for r in read_metrics(whole / "metrics.jsonl") if r["stage"] == "consolidate"]
    if name == "turns":
        last = rows[-1]["values"]
        assert last["chosen"] == np.ceil(0.4 * last["prefixes"] - 1e-9)
        assert last["sensitivity_chosen"] > last["sensitivity"] > 0
    assert ("retention_kl" in rows[-1]["values"]) == (name in ("retention", "privileged"))


def test_a_step_without_a_turn_above_the_floor_changes_nothing(ready, tmp_path):
    work = tmp_path / "run"
    shutil.copytree(ready, work)
    go(work, tiny_config(consolidate__turn_floor=99.0), stages=("consolidate",), change=True)
    old, new = (load_file(d / "model.safetensors") for d in (bundled.MODEL_DIR, work / POLICY))
    assert all((old[name] == new[name]).all() for name in old) and old.keys() == new.keys()
    rows = [
        r["values"] for r in read_metrics(work / "metrics.jsonl") if r["stage"] == "consolidate"
    ]
    assert [row["chosen"] for row in rows] == [0, 0, 0] and "loss" not in rows[0]
    assert all(0 < row["sensitivity"] < 99 and row["response_tokens"] > 0 for row in rows)


@pytest.mark.e2e
def test_a_guard_stops_a_round_and_keeps_the_last_good_checkpoint(
    ready, tmp_path, monkeypatch, capsys
):
    work = tmp_path / "run"
    shutil.copytree(ready, work)
    config = tiny_config(guard__entropy=(0.5, 2.0), consolidate__steps=6, evaluate__steps=(1, 5))
    shutil.rmtree(work / "round_001" / "trajectories")
    real = guards.Guard.broken

    def late(self, step, values):  # the entropy of step 4 is a hundred times what it was
        return real(self, step, dict(values) | ({"student_entropy": 100.0} if step == 4 else {}))

    monkeypatch.setattr(guards.Guard, "broken", late)
    go(work, config, stages=("deploy", "extract", "consolidate"), change=True)
    found = read_json(work / "round_001" / "guard.json")
    # Step 4 measures what step 3 made; the weights after step 2 were found good by step 3.
    assert (found["step"], found["measure"], found["kept_step"]) == (4, "student_entropy", 2)
    assert found["value"] == 100.0 and "GUARD: round 1 is stopped" in capsys.readouterr().out
    assert (work / "round_001" / "policy_step_001").is_dir()
    assert not (work / "round_001" / "policy_step_005").exists()
    with opened(work, config) as run:
        assert run.workdir.finished(1, "consolidate")
    plain = tmp_path / "plain"
    shutil.copytree(ready, plain)
    two = tiny_config(consolidate__steps=2)
    go(plain, two, stages=("deploy", "extract", "consolidate"), change=True)
    assert policy_bytes(work) == policy_bytes(plain)  # as if the round had had two steps


@pytest.mark.e2e
def test_policies_inside_a_round_are_kept_and_measured(ready, tmp_path):
    work, short = tmp_path / "run", tmp_path / "short"
    for place in (work, short):
        shutil.copytree(ready, place)
    go(work, tiny_config(evaluate__steps=(1,)), change=True)
    go(short, tiny_config(consolidate__steps=1), stages=("consolidate",), change=True)
    inside = work / "round_001" / "policy_step_001" / "model.safetensors"
    assert inside.read_bytes() == policy_bytes(short) != policy_bytes(work)
    result = read_json(work / "round_001" / "evaluate" / "step_001.json")
    rows = [
        (row["step"], row["values"]["pass_rate"])
        for row in read_metrics(work / "metrics.jsonl")
        if (row["stage"], row["round"]) == ("evaluate_consolidated", 1)
    ]
    assert [step for step, _ in rows] == [1, 3] and rows[0][1] == result["pass_rate"]
    with opened(work, tiny_config(evaluate__steps=(1,))) as run:
        assert run.workdir.finished(1, "consolidate") and run.workdir.finished(1, "evaluate")
        inside.unlink()
        assert not run.workdir.finished(1, "consolidate")


def test_the_band_is_that_of_the_first_step(finished_run):
    first = next(
        r["values"]
        for r in read_metrics(finished_run / "metrics.jsonl")
        if (r["stage"], r["round"], r["step"]) == ("consolidate", 1, 1)
    )
    with opened(finished_run, tiny_config()) as run:
        run.config.guard.response_tokens = (0.5, 2.0)
        assert guards.watches(run.config)
        watch = guards.Guard(run.config, run.workdir.metrics_file)
        assert watch.broken(1, first) is None
        for factor in (0.49, 2.01, np.nan):
            values = first | {"response_tokens": factor * first["response_tokens"]}
            seen = watch.broken(7, values)
            assert seen and seen.step == 7 and seen.measure == "response_tokens"
        run.config.guard.response_tokens = ()
        assert (
            not guards.watches(run.config)
            and guards.Guard(run.config, run.workdir.metrics_file).broken(7, values) is None
        )


@pytest.mark.e2e
def test_the_first_step_is_read_once_and_then_remembered(ready, tmp_path, monkeypatch):
    work = tmp_path / "run"
    shutil.copytree(ready, work)
    metrics = work / "metrics.jsonl"
    reads, real = [], guards.read_metrics
    monkeypatch.setattr(guards, "read_metrics", lambda path: reads.append(path) or real(path))
    with opened(work, tiny_config()) as run:
        run.config.guard.entropy = (0.5, 2.0)
        watch = guards.Guard(run.config, run.workdir.metrics_file)  # nothing is trained yet
        assert watch.broken(1, {"response_tokens": 3.0}) is None  # nothing was learned from
        assert watch.broken(2, {"student_entropy": 2.0}) is None
        for step in range(3, 50):
            assert watch.broken(step, {"student_entropy": 3.9}) is None
        seen = watch.broken(50, {"student_entropy": 4.1})
        assert (seen.low, seen.high) == (1.0, 4.0) and len(reads) == 1
    # A number that is not finite is a text in the file; everything is outside of such a band.
    row = {"stage": "consolidate", "round": 1, "step": 1, "values": {"student_entropy": "NaN"}}
    metrics.write_text(json.dumps(row) + "\n")
    with opened(work, tiny_config()) as run:
        run.config.guard.entropy = (0.5, 2.0)
        assert guards.Guard(run.config, run.workdir.metrics_file).broken(
            2, {"student_entropy": 1.0}
        )


@pytest.mark.e2e
def test_a_policy_that_lost_its_skills_is_not_kept(ready, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(skills, "BOARDS", 4)
    monkeypatch.setattr(skills, "SEEDS", 1)
    work = tmp_path / "run"
    shutil.copytree(ready, work)
    ruin = {"consolidate__learning_rate": 0.05, "evaluate__steps": (1,)}
    config = tiny_config(evaluate__skills=True, guard__skill_drop=0.2, **ruin)
    go(work, config, stages=("consolidate",), change=True)
    record = read_json(work / "round_001" / "guard_skill.json")
    assert [one["policy"] for one in record["tried"]] == [
        "policy",
        "policy_step_001",
        "the one the round began with",
    ]
    assert all(record["start"] - one["skill"] > 0.2 for one in record["tried"][:2])
    assert policy_bytes(work) == (bundled.MODEL_DIR / "model.safetensors").read_bytes()
    assert "GUARD: round 1 lost skill" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"consolidate__turn_fraction": 0.0}, r"config\.consolidate\.turn_fraction is 0.0"),
        ({"consolidate__retention": "base"}, r"config\.consolidate\.retention is 'base'"),
        (
            {"consolidate__retention": "plain", "consolidate__teacher": "ema"},
            r"config\.consolidate\.retention is 'plain'.*teacher='ema'",
        ),
        (
            {"consolidate__mode": "sft", "consolidate__teacher": "ema"},
            r"config\.consolidate\.teacher is 'ema'.*mode='sft'",
        ),
        ({"guard__entropy": (1.5, 2.0)}, r"config\.guard\.entropy .*low below 1"),
        ({"guard__skill_drop": 0.1}, r"config\.guard\.skill_drop .*config\.evaluate\.skills"),
        ({"evaluate__steps": (3,)}, r"config\.evaluate\.steps .*below config\.consolidate\.steps"),
    ],
)
def test_bad_values_are_refused_at_the_start(changes, message):
    with pytest.raises(UserError, match=message):
        validate(tiny_config(**changes))
