"""Pass rates: their shape, their random streams, and the boards that deployment never showed."""

import importlib

import pytest
from tiny_run import contents, copy_of, go, opened, policy_of, tiny_config

from oel_jax import environments
from oel_jax.actor.evaluate import _seen_boards
from oel_jax.base.files import read_json
from oel_jax.report.intervals import board_clustered_interval
from oel_jax.runs.keys import chain_key
from oel_jax.runs.metrics import read_metrics

module = importlib.import_module("oel_jax.actor.evaluate")


@pytest.fixture
def jobs(monkeypatch):
    """All evaluation games that are played."""
    seen = []
    recording = importlib.import_module("oel_jax.actor.recording")
    play = recording.play

    def watched(player, jobs, progress):
        seen.extend(jobs)
        return play(player, jobs, progress)

    monkeypatch.setattr(recording, "play", watched)
    return seen


@pytest.fixture
def records(monkeypatch):
    """The record of every game of the last evaluation."""
    last = []
    summarise = module._summarise

    def recording(config, records, *rest):
        last[:] = records
        return summarise(config, records, *rest)

    monkeypatch.setattr(module, "_summarise", recording)
    return last


def evaluated(workdir, **changes):
    """The starting model without knowledge."""
    with opened(workdir, tiny_config(**changes)) as run:
        file = run.workdir.start_evaluation
        return module.evaluate(
            run, policy_of(run, 1), file, round_number=0, name="start", label="x"
        )


def test_the_numbers_follow_from_the_games(tmp_path, records):
    result = evaluated(tmp_path)
    assert len(records) == result["games"] == 8
    order = [(record["seed_index"], record["map"]) for record in records]
    assert order == [(seed, column) for seed in range(2) for column in range(4)]
    won = [record["passed"] for record in records]
    boards = environments.board_ids("frozen_lake", environments.heldout_seeds(4))
    assert [record["board"] for record in records] == boards * 2
    assert result["boards"] == len(set(boards))
    mean, low, high = board_clustered_interval([won[:4], won[4:]], boards)
    assert (result["pass_rate"], result["ci95"]) == (mean, [low, high])
    assert mean == sum(won) / 8
    assert result["per_seed"] == [sum(won[:4]) / 4, sum(won[4:]) / 4]
    assert "".join(result["passed"]) == "".join("01"[w] for w in won)
    tokens = [record["tokens"] for record in records]
    answers = [length for game in tokens for length in game]
    assert result["response_tokens"] == pytest.approx(sum(answers) / len(answers))
    assert result["turns"] == pytest.approx(len(answers) / 8)
    assert (result["random_policy"], result["perfect_play"]) == (1107 / 65536, 1.0)
    assert result["unseen"]["maps"] == 4  # nothing is deployed before round 1


def test_a_finished_evaluation_is_read_back(finished_run, tmp_path, jobs):
    work = copy_of(finished_run, tmp_path / "run")
    result = evaluated(work)
    assert result == read_json(finished_run / "evaluate" / "start.json") and not jobs


@pytest.mark.parametrize("mode", ["constant", "independent"])
def test_constant_seeds_make_identical_games_of_identical_boards(tmp_path, records, mode):
    evaluated(tmp_path, evaluate__seed_mode=mode, evaluate__maps=24, evaluate__seeds=1)
    by_board: dict[str, list] = {}
    for record in records:
        by_board.setdefault(record["board"], []).append((record["passed"], record["tokens"]))
    repeated = [played for played in by_board.values() if len(played) > 1]
    assert len(repeated) >= 3
    same = all(game == played[0] for played in repeated for game in played)
    assert same == (mode == "constant")


def test_every_game_has_its_own_stream_unless_constant(tmp_path):
    for mode, distinct in (("independent", 2 * 3), ("constant", 2)):
        with opened(tmp_path / mode, tiny_config(evaluate__seed_mode=mode)) as run:
            keys = {
                tuple(chain_key(run.config, seed, "evaluate", 1, "consolidated", seed, board, turn))
                for seed in range(2)
                for board, turn in ((7, 0), (7, 1), (8, 0))
            }
            assert len(keys) == distinct


def test_knowledge_in_context_is_dealt_out_by_seed_and_by_n(finished_run, tmp_path, jobs):
    work = copy_of(finished_run, tmp_path / "run", "evaluate")
    go(work, tiny_config(evaluate__curve=(1, 2), evaluate__seeds=3), change=True)
    place = work / "round_001" / "knowledge"
    step = {
        n: [read_json(place / f"chain_{k:02d}/step_{n:03d}.json")["text"] for k in range(2)]
        for n in (1, 2)
    }
    assert step[1] != step[2]
    assert len(jobs) == 3 * 12
    every = [(seed, column) for seed in range(3) for column in range(4)]
    for n, start in ((1, 0), (2, 12)):
        part = jobs[start : start + 12]
        assert sorted(job.tag for job in part) == every
        assert all(job.context.text == step[n][job.tag[0] % 2] for job in part)
        # Both texts are played with at the same time, since each is once in the sampler.
        assert {job.tag[0] for job in part[:2]} == {0, 1}
    assert [job.context.text for job in jobs[24:]] == [""] * 12
    # n of the curve that is also the n of the round is measured once; all points are on record.
    names = contents(work, "round_001/evaluate/*")
    assert {name.rsplit("/")[-1] for name in names} == {
        name + end
        for name in ("curve_001", "in_context", "consolidated")
        for end in (".json", ".samples.json")
    }
    rows = [r for r in read_metrics(work / "metrics.jsonl") if r["stage"] == "evaluate_in_context"]
    assert [row["step"] for row in rows] == [1, 2]


def test_boards_of_all_rounds_so_far_count_as_seen(finished_run):
    config = tiny_config()
    seeds = [seed for step in (1, 2, 3) for seed in environments.deploy_seeds(1, step, 4)]
    first = set(environments.board_ids("frozen_lake", seeds))
    assert _seen_boards(config, 0) == set()
    assert _seen_boards(config, 1) == first
    assert _seen_boards(config, 2) > first
    unseen = read_json(finished_run / "round_001" / "evaluate" / "consolidated.json")["unseen"]
    held_out = environments.board_ids("frozen_lake", environments.heldout_seeds(4))
    assert unseen["maps"] == sum(board not in first for board in held_out)


@pytest.mark.slow
def test_sokoban_has_34_unseen_maps_after_a_round_of_the_paper():
    """Spec 9.1: 34 of 128 held-out maps at 64 games in each of 100 steps."""
    config = tiny_config(game__name="sokoban", deploy__games_per_step=64, consolidate__steps=100)
    seen = _seen_boards(config, 1)
    held_out = environments.board_ids("sokoban", environments.heldout_seeds(128))
    assert sum(board not in seen for board in held_out) == 34
    assert len(seen) == 3061
