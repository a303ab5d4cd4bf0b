"""Games that were played over HTTP reach the extractor as games do."""

import itertools
import random

import pytest

from oel_jax import environments
from oel_jax.actor.conversations import Preparation, by_name, policies_of, seconds_since
from oel_jax.config.file import load_config
from oel_jax.data import prompts
from oel_jax.data.conversations import ConversationStore, now
from oel_jax.data.history import history
from oel_jax.data.messages import user
from oel_jax.data.trajectories import Trajectory, Turn
from oel_jax.environments.textarena import GENERIC_RULES
from oel_jax.models.bundled import resolve_bundled
from oel_jax.online.games import by_policy, played, summarise
from oel_jax.online.players import games_played, seeds_of

ACTIONS = ("[right]", "[down]", "go [left]!", "I do not know", "<think>hm</think>\n[up]")


def play(seed, rng):
    """(game, what the endpoint would record of it: messages, response, feedback)."""
    game = environments.make("frozen_lake", seed)
    exchanges, turns = [], []
    while not game.done:
        message = prompts.play_prompt(game.situation())
        observation, response = game.observation(), rng.choice(ACTIONS)
        game.step(response)
        turns.append((observation, response))
        said = game.outcome() if game.done else game.observation()
        exchanges.append((message, response, said))
    return game, turns, exchanges


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A store to which many players' exchanges came in turns, and the games."""
    rng, games = random.Random(3), {}
    store = ConversationStore(tmp_path_factory.mktemp("store"))
    talks = []
    for number in range(20):
        game, turns, exchanges = play(505_209_463 + 1000 * number, rng)
        games[f"game {number}"] = (game, turns)
        talks.append([(f"game {number}", t, *each) for t, each in enumerate(exchanges)])
    for wave in itertools.zip_longest(*talks):
        for name, t, message, response, said in filter(None, wave):
            turn = Turn(messages=(user(message),), response=response, time=now())
            one = Trajectory(
                policy="round_000" if t < 3 else "round_001",
                purpose="deploy",
                turns=(turn,),
                id=f"chatcmpl-{name}-{t}",
                conversation=name,
                user=f"player of {name}",
            )
            store.append_exchange(one)
            store.append_feedback(one.id, said)
    store.close()
    return store, games


def test_the_extractor_reads_what_it_reads_of_a_game(recorded, tmp_path):
    store, games = recorded
    config = load_config("nano_frozen_lake_online")
    directory = resolve_bundled("nano")
    preparation = Preparation(config, directory, None, 1)
    pieces = list(store.read())
    assert len(pieces) > len(games)  # prompts that begin anew are pieces, until they are joined
    found = {one.id: one for one in by_name(pieces)}
    assert sorted(found) == sorted(games)
    from collections import Counter

    for name, (game, turns) in games.items():
        made = preparation.prepare(found[name], 0, Counter())
        assert history(made) == prompts.extraction_history(turns, game.outcome())
        assert [turn.observation for turn in made.turns] == [text for text, _ in turns]
        for turn, point in zip(made.turns, made.points(), strict=True):
            assert turn.messages[-1]["content"].endswith("\n")  # a situation, not its wrapper
            assert point.dialogue.wrapper == "grid"


def test_who_answered_and_when(recorded):
    store, games = recorded
    for one in by_name(store.read()):
        game = games[one.id][0]
        expected = {"round_000"} if game.turns <= 3 else {"round_000", "round_001"}
        assert policies_of(one) == expected
        assert -5 < seconds_since(one) < 3600


def test_the_rules_that_are_left_out_are_those_of_the_game():
    config = load_config("nano_frozen_lake_online")
    assert config.logs.leave_out == GENERIC_RULES


def test_it_differs_from_the_default_run_by_its_logs_alone():
    from oel_jax.config.fields import leaves

    ours = leaves(load_config("nano_frozen_lake_online").to_dict())
    default = leaves(load_config("nano_frozen_lake").to_dict())
    different = {path for path in ours if ours[path] != default[path]}
    assert {path for path in different if not path.startswith("logs.")} == {
        "game.name",
        "preflight.games",
    }


def test_players_have_boards_of_their_own():
    players, each = 7, 3000
    seeds = [
        seed
        for player in range(players)
        for seed in itertools.islice(seeds_of(player, players), each)
    ]
    assert len(set(seeds)) == players * each
    assert not set(seeds) & set(environments.heldout_seeds())
    later = next(iter(seeds_of(2, players, first=5)))
    assert later == list(itertools.islice(seeds_of(2, players), 6))[5]


def test_pass_rates_count_games_of_one_policy(tmp_path):
    import json

    file = tmp_path / "games.jsonl"
    rows = []
    for number in range(60):
        policies = ["round_000"] if number < 20 else ["round_001"]
        if number == 20:
            policies = ["round_000", "round_001"]
        rows.append(
            {
                "conversation": f"player_000_game_{number:05d}",
                "policy": policies[-1],
                "policies": policies,
                "passed": number % 4 == 0 if number < 20 else True,
                "board": f"b{number % 5}",
                "turns": 4,
                "ended": float(number),
            }
        )
    file.write_text("\n".join(map(json.dumps, rows)) + '\n{"cut')
    games = played(file)
    assert len(games) == 60 and games_played(file) == 60
    found = by_policy(games)
    assert found["round_000"]["games"] == 20 and found["round_000"]["pass_rate"] == 0.25
    assert found["round_001"]["games"] == 39 and found["round_001"]["pass_rate"] == 1.0
    text = summarise(file, tmp_path, rounds=1)
    assert "+75.0%" in text and "1 games saw a new policy" in text
    assert (tmp_path / "pass_rate.svg").read_text().count("round_00") >= 1
    assert json.loads((tmp_path / "summary.json").read_text())["rise"] == 0.75
