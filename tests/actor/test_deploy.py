"""Games of a round: their order, their independence of each other, and what a file may hold."""

import json

import pytest
from tiny_run import contents, copy_of, opened, tiny_config

from oel_jax import environments
from oel_jax.actor.deploy import deploy
from oel_jax.base.errors import UserError
from oel_jax.data.prompts import play_prompt
from oel_jax.data.trajectory_files import read
from oel_jax.runs.metrics import read_metrics


def played(workdir):
    return contents(workdir, "round_001/trajectories/*")


def test_games_stand_in_the_order_of_their_seeds(finished_run):
    place = finished_run / "round_001" / "trajectories"
    files = {f"extract_{k:04d}": environments.extraction_seeds(1, 2) for k in range(2)}
    files |= {f"deploy_{s - 1:04d}": environments.deploy_seeds(1, s, 4) for s in (1, 2, 3)}
    assert {path.stem for path in place.iterdir()} == files.keys()
    for name, seeds in files.items():
        lines = (place / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["seed"] for line in lines] == seeds
    first, second = (read(place / f"extract_{k:04d}.jsonl") for k in range(2))
    assert [g.turns for g in first] != [g.turns for g in second]  # same boards, other samples


def test_a_game_depends_neither_on_the_slots_nor_on_who_else_plays(finished_run, tmp_path):
    config = tiny_config(sampler__slots=2, sampler__prefill_rows=2, consolidate__steps=1)
    with opened(tmp_path, config) as run:
        deploy(run, 1)
    few, many = played(tmp_path), played(finished_run)
    assert len(few) == 3  # two chains, one step
    assert few == {name: many[name] for name in few}


def test_another_loop_seed_plays_other_games(finished_run, tmp_path):
    with opened(tmp_path, tiny_config(seed=1, consolidate__steps=1)) as run:
        deploy(run, 1)
    name = "round_001/trajectories/deploy_0000.jsonl"
    assert played(tmp_path)[name] != played(finished_run)[name]


def test_shared_trajectories_are_one_set(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", "extract", "consolidate", "evaluate")
    (work / "round_001" / "trajectories" / "extract_0001.jsonl").unlink()
    with opened(work, tiny_config(extract__trajectories="shared"), change=True) as run:
        files = deploy(run, 1)
    expected = played(finished_run)
    del expected["round_001/trajectories/extract_0001.jsonl"]
    assert played(work) == expected and len(files) == len(expected)


def test_no_score_is_in_any_trajectory(finished_run):
    def keys(value):
        if isinstance(value, dict):
            return set(value) | {k for inner in value.values() for k in keys(inner)}
        return {k for inner in value for k in keys(inner)} if isinstance(value, list) else set()

    found = {
        key
        for path in (finished_run / "round_001" / "trajectories").iterdir()
        for line in path.read_text().splitlines()
        for key in keys(json.loads(line))
    }
    turn = {"messages", "prompt_ids", "response", "response_ids", "action", "observation"}
    game = {"game", "seed", "policy", "round", "purpose", "chain", "wrapper", "turns", "outcome"}
    assert found == turn | game | {"schema", "role", "content"}


def test_what_is_written_fits_together(finished_run):
    """The ids are the text's ids, the last prompt holds what the game has said before."""
    from oel_jax.chat.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_config().model.path)
    for game in read(finished_run / "round_001" / "trajectories" / "deploy_0000.jsonl"):
        replay = environments.make(game.game, game.seed)
        for turn in game.turns:
            (message,) = turn.messages
            prompt = play_prompt(message["content"])
            assert list(turn.prompt_ids) == tokenizer.chat(prompt, thinking=True)
            assert turn.response == tokenizer.decode(turn.response_ids)
            assert replay.situation() == message["content"]
            assert turn.observation == replay.observation()
            assert turn.action == replay.step(turn.response)
        assert replay.done and game.outcome == replay.outcome()


def test_metrics_count_games_answers_and_tokens(finished_run):
    rows = read_metrics(finished_run / "metrics.jsonl")
    (row,) = (row for row in rows if row["stage"] == "deploy")
    place = finished_run / "round_001" / "trajectories"
    for purpose, pattern in (("extract", "extract_*"), ("deploy", "deploy_*")):
        turns = [g.turns for path in place.glob(pattern) for g in read(path)]
        answers = [turn.response_ids for game in turns for turn in game]
        # 3 and 1 are the nano model's stop ids; the stop token is not part of the length.
        stopped = [ids[-1] in (3, 1) for ids in answers]
        values = row["values"]
        assert values[f"{purpose}_turns"] == pytest.approx(len(answers) / len(turns))
        assert values[f"{purpose}_cut_off"] == pytest.approx(1 - sum(stopped) / len(answers))
        tokens = sum(map(len, answers)) - sum(stopped)
        assert values[f"{purpose}_response_tokens"] == pytest.approx(tokens / len(answers))


def test_a_prompt_longer_than_the_cache_is_named_and_nothing_is_lost(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", "extract", "consolidate", "evaluate")
    (work / "round_001" / "trajectories" / "deploy_0002.jsonl").unlink()
    before = played(work)
    # Room for 51 - 48 = 3 tokens of prompt.
    with opened(work, tiny_config(sampler__max_len=51)) as run:
        with pytest.raises(UserError, match=r"does not fit into the cache of 51.*sampler\.max_len"):
            deploy(run, 1)
    assert played(work) == before
    with opened(work, tiny_config()) as run:
        deploy(run, 1)
    assert played(work) == played(finished_run)
