"""Consolidation as a stage: which knowledge, which answers, which policy, and when it refuses."""

import importlib
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import contents, copy_of, go, opened, tiny_config

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.chat.render import render
from oel_jax.data.messages import Context
from oel_jax.data.trajectories import decision_points
from oel_jax.data.trajectory_files import TrajectoryStore, read
from oel_jax.distill.reference import divergence
from oel_jax.learner import rollouts
from oel_jax.models import bundled
from oel_jax.models.language_model import load_model
from oel_jax.parallel.mesh import make_mesh
from oel_jax.report import page as report
from oel_jax.runs.metrics import read_metrics
from oel_jax.runs.workdir import Workdir
from oel_jax.sampler.sampler import Sampler

module = importlib.import_module("oel_jax.learner.consolidate")


@pytest.fixture
def samples(monkeypatch):
    """The samples of every step."""
    steps = []
    plan = module.plan

    def recording(samples, *rest):
        steps.append(samples)
        return plan(samples, *rest)

    monkeypatch.setattr(module, "plan", recording)
    return steps


def weights(directory):
    return load_file(directory / "model.safetensors")


def test_a_step_trains_on_all_prefixes_each_with_a_drawn_text(finished_run, tmp_path, samples):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    go(work, tiny_config(), ["consolidate"])
    assert len(samples) == 3
    for step, batch in enumerate(samples, 1):
        games = read(work / "round_001" / "trajectories" / f"deploy_{step - 1:04d}.jsonl")
        expected = [point.prompt_ids for point in decision_points(games)]
        assert [tuple(sample.prompt) for sample in batch] == expected
        assert len(expected) == sum(len(game.turns) for game in games)
        # Spec 8.1 step 3, written out: random.Random(s + 1000 * round), in batch order.
        rng = random.Random(step + 1000)
        assert [sample.knowledge for sample in batch] == [rng.choice([0, 1]) for _ in batch]
        assert any(list(s.response) != list(t.response_ids) for s, t in zip(
            batch, [turn for game in games for turn in game.turns], strict=True
        ))  # fmt: skip
    rows = [r for r in read_metrics(work / "metrics.jsonl") if r["stage"] == "consolidate"]
    assert [row["values"]["prefixes"] for row in rows] == [len(batch) for batch in samples]
    answers = [np.array([len(s.response) for s in batch]) for batch in samples]
    for row, lengths in zip(rows, answers, strict=True):
        cut = row["values"]["cut_off"] * len(lengths)
        tokens = row["values"]["response_tokens"] * len(lengths)
        assert tokens == pytest.approx(lengths.sum() - (len(lengths) - cut))


def test_the_remainder_can_be_dropped_as_the_released_code_does(finished_run, tmp_path, samples):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    config = tiny_config(consolidate__drop_remainder=4, consolidate__steps=1)
    go(work, config, ["consolidate"], change=True)
    games = read(work / "round_001" / "trajectories" / "deploy_0000.jsonl")
    expected = [point.prompt_ids for point in decision_points(games)]
    kept = len(expected) - len(expected) % 4
    assert [tuple(sample.prompt) for sample in samples[0]] == expected[:kept]


@pytest.mark.parametrize("sizes", [(12,), (1, 5, 6)])
def test_a_step_does_not_depend_on_the_files_of_the_store(finished_run, tmp_path, samples, sizes):
    """The same games in other files: every step trains on the same."""
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    store = TrajectoryStore(work / "round_001" / "trajectories")
    lines = [line for path in store.files("deploy") for line in path.read_bytes().splitlines(True)]
    for path in store.files("deploy"):
        path.unlink()
    for number, size in enumerate(sizes):
        store.path("deploy", number).write_bytes(b"".join(lines[:size]))
        del lines[:size]
    with opened(work, tiny_config()) as run:
        module.consolidate(run, 1)
    name = "round_001/policy/model.safetensors"
    assert contents(work, name) == contents(finished_run, name) and not lines


def test_games_that_are_missing_are_named(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    place = work / "round_001" / "trajectories"
    (place / "deploy_0002.jsonl").unlink()
    with opened(work, tiny_config()) as run, pytest.raises(UserError) as caught:
        module.consolidate(run, 1)
    message = f"{place} holds 8 trajectories for 'deploy', and numbers 9 to 12 are needed"
    assert message in str(caught.value)


def test_trajectories_of_somebody_else_s_model_are_not_trained_on(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    path = work / "round_001" / "trajectories" / "deploy_0000.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for turn in lines[1]["turns"]:
        del turn["prompt_ids"], turn["response_ids"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with opened(work, tiny_config()) as run, pytest.raises(UserError, match="has no ids") as caught:
        module.consolidate(run, 1)
    assert f"{path}: Trajectory(frozen_lake seed {lines[1]['seed']}" in str(caught.value)


NOTHING = dict(consolidate__drop_remainder=1000, log__tensorboard=True)
NOTHING |= dict(guard__response_tokens=(0.5, 2.0), guard__entropy=(0.5, 2.0))


def check_nothing_was_learned(work, out):
    """The steps are logged without the numbers they do not have; whoever reads them copes."""
    old, new = (weights(directory) for directory in (bundled.MODEL_DIR, work / "round_001/policy"))
    assert all(np.array_equal(old[name], new[name]) for name in old)
    rows = [r for r in read_metrics(work / "metrics.jsonl") if r["stage"] == "consolidate"]
    assert [row["values"] for row in rows] == [{"prefixes": 0.0}] * 3
    assert "3/3 steps" in out and "| nothing to learn" in out
    assert "3 of 3 steps had nothing to learn from" in out and "drop_remainder=1000" in out
    report.write(Workdir(work))
    assert "Consolidation" in (work / "report.html").read_text(encoding="utf-8")


def test_steps_that_drop_all_prefixes_have_nothing_to_learn(finished_run, tmp_path, capsys):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    go(work, tiny_config(**NOTHING), ["consolidate"], change=True)
    check_nothing_was_learned(work, capsys.readouterr().out)


def test_some_steps_may_have_nothing_to_learn(finished_run, tmp_path, samples):
    """A step of four decision points, of which five at a time are kept."""
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    path = work / "round_001" / "trajectories" / "deploy_0001.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    short = [line | {"turns": line["turns"][:1]} for line in lines]  # four decision points
    path.write_text("".join(json.dumps(line) + "\n" for line in short))
    config = tiny_config(consolidate__drop_remainder=5)
    with opened(work, config, change=True) as run:
        module.consolidate(run, 1)
    rows = [
        r["values"] for r in read_metrics(work / "metrics.jsonl") if r["stage"] == "consolidate"
    ]
    assert ["loss" in row for row in rows] == [True, False, True] and len(samples) == 2
    assert rows[1] == {"prefixes": 0.0}


def test_the_policy_is_the_trained_model_in_bfloat16(finished_run):
    config = tiny_config()
    policy = finished_run / "round_001" / "policy"
    before = weights(Path(config.model.path))
    after = weights(policy)
    assert before.keys() == after.keys()
    assert {value.dtype.name for value in after.values()} == {"bfloat16"}
    moved = [
        np.abs(after[name].astype(np.float32) - before[name].astype(np.float32)).max()
        for name in before
    ]
    # Three AdamW steps move a weight by about three times the rate, and bfloat16 rounds it.
    assert max(moved) > config.consolidate.learning_rate
    assert all(m < 0.05 for m in moved)


def test_float32_masters_can_be_handed_on(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    go(work, tiny_config(consolidate__keep_fp32_master=True), ["consolidate"], change=True)
    kept, rounded = (weights(w / "round_001" / "policy") for w in (work, finished_run))
    assert {value.dtype.name for value in kept.values()} == {"float32"}
    assert read_json(work / "round_001" / "policy" / "config.json")["torch_dtype"] == "float32"
    for name in kept:
        np.testing.assert_array_equal(kept[name].astype(rounded[name].dtype), rounded[name])


def test_training_starts_from_the_rounds_policy_with_a_fresh_optimizer(finished_run, tmp_path):
    """Twice the same round 1 from the same weights: nothing is carried over from elsewhere."""
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    go(work, tiny_config(consolidate__save_every=100), ["consolidate"], change=True)
    name = "round_001/policy/model.safetensors"
    assert contents(work, name) == contents(finished_run, name)
    assert not list((work / "round_001" / "consolidate").glob("[0-9]*"))


def test_empty_knowledge_stops_the_run(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    path = work / "round_001" / "knowledge" / "knowledge.json"
    write_json(path, read_json(path) | {"texts": ["", " \n"]})
    before = contents(work, "round_001/**/*")
    with opened(work, tiny_config()) as run, pytest.raises(UserError) as caught:
        module.consolidate(run, 1)
    message = str(caught.value)
    assert f"{path}: all 2 knowledge texts are empty" in message and "config.extract" in message
    assert contents(work, "round_001/**/*") == before


def test_one_empty_text_is_reported(finished_run, tmp_path, capsys, samples):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    path = work / "round_001" / "knowledge" / "knowledge.json"
    texts = ["", "- EXPERIENCE ITEM: Stepping on H loses the game."]
    write_json(path, read_json(path) | {"texts": texts})
    with opened(work, tiny_config(consolidate__steps=1), change=True) as run:
        module.consolidate(run, 1)
    assert "knowledge of chain(s) [0] is empty" in capsys.readouterr().out
    # Without knowledge the teacher's prompt is the student's.
    (batch,) = samples
    plain = [sample for sample in batch if sample.knowledge == 0]
    assert plain and all(s.shared + len(s.suffix) == len(s.prompt) for s in plain)
    assert all(s.shared + len(s.suffix) > len(s.prompt) for s in batch if s.knowledge == 1)


def test_trajectories_of_another_model_are_refused(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    path = work / "round_001" / "trajectories" / "deploy_0000.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["turns"][0]["prompt_ids"][3] = 151_643
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with opened(work, tiny_config()) as run, pytest.raises(UserError) as caught:
        module.consolidate(run, 1)
    assert f"{path}: prompt id 151643" in str(caught.value)
    assert not (work / "round_001" / "policy").exists()


@pytest.mark.parametrize("content, message", [(b"", "is empty"), (b"{]\n", "1: not JSON")])
def test_a_bad_trajectory_file_is_named(finished_run, tmp_path, content, message):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    path = work / "round_001" / "trajectories" / "deploy_0000.jsonl"
    path.write_bytes(content)
    with opened(work, tiny_config()) as run, pytest.raises(UserError) as caught:
        module.consolidate(run, 1)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_step_tells_its_memory_its_time_and_its_trace(finished_run, tmp_path, capsys):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    before = read_metrics(work / "metrics.jsonl")
    go(work, tiny_config(profile="step:2..2"), ["consolidate"])
    out = capsys.readouterr().out
    for name in ("student, float32", "AdamW's moments", "knowledge, encoded", "rollout cache"):
        assert name in out
    assert "predicted" in out and "GB predicted for a step" in out
    # Where TensorBoard's profile plugin looks: next to the curves of the stage.
    assert list((work / "tensorboard/plugins/profile").glob("*/*.xplane.pb"))
    (row,) = [r for r in read_metrics(work / "metrics.jsonl") if r["stage"] == "time_consolidate"]
    assert row["time"]["consolidate_seconds"] > row["time"]["consolidate_compile_seconds"] >= 0
    assert row["values"] == {} and len(before) > 0


def test_rollouts_read_their_common_beginning_once(finished_run, tmp_path, monkeypatch):
    """With and without the shared beginning: the same answers, less to encode."""
    made, answers = [], []
    plan, build = module.plan, Sampler.__init__

    def watched_build(sampler, *words, **settings):
        build(sampler, *words, **settings)
        made.append(sampler)

    def watched_plan(samples, *rest):
        answers.append([sample.response for sample in samples])
        return plan(samples, *rest)

    monkeypatch.setattr(Sampler, "__init__", watched_build)
    monkeypatch.setattr(module, "plan", watched_plan)
    for least in (1, 10_000):
        work = copy_of(finished_run, tmp_path / str(least), "consolidate", "evaluate")
        monkeypatch.setattr(rollouts, "SHARED_FROM", least)
        go(work, tiny_config(consolidate__steps=1), ["consolidate"], change=True)
    assert made[0].encoded < made[1].encoded
    assert answers[0] == answers[1]


# --- off-policy baselines -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demonstrated_run(finished_run, tmp_path_factory):
    """The finished run's games and knowledge, then demonstrations and off-policy distillation."""
    work = tmp_path_factory.mktemp("off") / "run"
    copy_of(finished_run, work, "consolidate", "evaluate")
    go(work, tiny_config(**OFF_POLICY), ["demonstrate"], change=True)
    return work


OFF_POLICY = dict(consolidate__mode="off_policy")  # which brings its loss: spec 10.2


def test_the_demonstrator_reads_the_knowledge_of_each_game(demonstrated_run):
    texts = read_json(demonstrated_run / "round_001" / "knowledge" / "knowledge.json")["texts"]
    for step in (1, 2, 3):
        games = read(
            demonstrated_run / "round_001" / "trajectories" / f"demonstrate_{step - 1:04d}.jsonl"
        )
        played = read(
            demonstrated_run / "round_001" / "trajectories" / f"deploy_{step - 1:04d}.jsonl"
        )
        assert [game.seed for game in games] == [game.seed for game in played]  # the same boards
        rng = random.Random(step + 1000)
        for game in games:
            text = texts[rng.choice([0, 1])]
            assert game.purpose == "demonstrate"
            assert game.context == Context("knowledge", text)


@pytest.mark.parametrize("mode", ["off_policy", "sft"])
def test_demonstrated_answers_are_learned_behind_the_plain_prompt(
    demonstrated_run, tmp_path, samples, mode
):
    work = copy_of(demonstrated_run, tmp_path / "run")
    changes = {"consolidate__mode": mode}
    go(work, tiny_config(**changes), ["consolidate"], change=True)
    for step, batch in enumerate(samples, 1):
        games = read(work / "round_001" / "trajectories" / f"demonstrate_{step - 1:04d}.jsonl")
        turns = [turn for game in games for turn in game.turns]
        assert [list(s.response) for s in batch] == [list(turn.response_ids) for turn in turns]
        for sample, turn in zip(batch, turns, strict=True):
            assert len(sample.prompt) < len(turn.prompt_ids)
            # What the teacher reads is what the demonstrator read.
            assert sample.shared + len(sample.suffix) == len(turn.prompt_ids)
            assert list(sample.suffix) == list(turn.prompt_ids[sample.shared :])
    rows = [r for r in read_metrics(work / "metrics.jsonl") if r["stage"] == "consolidate"]
    losses = [row["values"]["loss"] for row in rows]
    assert len(losses) == 3 and "log_prob_gap" not in rows[0]["values"]
    before, after = (weights(d) for d in (bundled.MODEL_DIR, work / "round_001" / "policy"))
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def test_the_loss_of_the_first_step_is_the_mode_s_own(demonstrated_run, tmp_path, samples):
    """From the files alone: plain forward KL and plain cross entropy, one answer at a time."""
    model = load_model(bundled.MODEL_DIR, dtype="float32", mesh=make_mesh(1, 1, jax.devices()[:1]))
    expected = {"off_policy": [], "sft": []}
    for game in read(demonstrated_run / "round_001" / "trajectories" / "demonstrate_0000.jsonl"):
        for turn, point in zip(game.turns, game.points(), strict=True):
            plain = render(model.tokenizer, point.dialogue, thinking=True)
            response = list(turn.response_ids)
            z_s, z_t = (
                model.logits([[*ids, *response]])[0, len(ids) - 1 : -1]
                for ids in (plain, list(turn.prompt_ids))
            )
            for mode, kind in (("off_policy", "forward"), ("sft", "nll")):
                expected[mode] += divergence(
                    z_s, z_t, np.array(response), top_k=16, temperature=0.7, kind=kind,
                    support="teacher",
                ).tolist()  # fmt: skip
    for mode, values in expected.items():
        work = copy_of(demonstrated_run, tmp_path / mode)
        changes = OFF_POLICY | {"consolidate__mode": mode}
        go(work, tiny_config(**changes), ["consolidate"], change=True)
        row = next(r for r in read_metrics(work / "metrics.jsonl") if r["stage"] == "consolidate")
        assert row["values"]["loss"] == pytest.approx(np.mean(values), rel=1e-3)


def test_the_remainder_of_demonstrations_is_dropped_too(demonstrated_run, tmp_path, samples):
    work = copy_of(demonstrated_run, tmp_path / "run")
    path = work / "round_001" / "trajectories" / "demonstrate_0000.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["turns"][0]["response_ids"] = []  # an empty answer: no token to learn from
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    turns = [turn for line in lines for turn in line["turns"]][1:]
    config = tiny_config(**OFF_POLICY, consolidate__steps=1, consolidate__drop_remainder=4)
    with opened(work, config, change=True) as run:
        module.consolidate(run, 1)
    kept = len(turns) - len(turns) % 4
    expected = [turn["response_ids"] for turn in turns[:kept]]
    assert kept and [list(sample.response) for sample in samples[0]] == expected


def test_demonstrations_that_are_all_dropped_teach_nothing(demonstrated_run, tmp_path, capsys):
    work = copy_of(demonstrated_run, tmp_path / "run")
    go(work, tiny_config(**OFF_POLICY, **NOTHING), ["consolidate"], change=True)
    check_nothing_was_learned(work, capsys.readouterr().out)


def test_demonstrations_of_other_knowledge_are_refused(demonstrated_run, tmp_path):
    work = copy_of(demonstrated_run, tmp_path / "run")
    pool = work / "round_001" / "knowledge" / "knowledge.json"
    record = read_json(pool)
    record["texts"] = ["- EXPERIENCE ITEM: H wins.", "- EXPERIENCE ITEM: G loses."]
    write_json(pool, record)
    with opened(work, tiny_config(**OFF_POLICY), change=True) as run:
        with pytest.raises(
            UserError, match=r"demonstrate_0000\.jsonl: the game of seed .*knowledge that was drawn"
        ):
            module.consolidate(run, 1)


def test_consolidation_waits_for_the_demonstrations(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    with pytest.raises(UserError, match="consolidate needs demonstrate first"):
        go(work, tiny_config(**OFF_POLICY), ["consolidate"], change=True)
