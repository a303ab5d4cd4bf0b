"""The frozen conversations of a chat round: which side, which turns, how many, and what is left."""

import shutil

import pytest
from tiny_run import contents, opened

from oel_jax import environments
from oel_jax.actor import snapshot
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.chat.render import render
from oel_jax.chat.tokenizer import load_tokenizer
from oel_jax.data import prompts
from oel_jax.data.conversations import ConversationStore
from oel_jax.data.history import history
from oel_jax.data.messages import Dialogue, user
from oel_jax.data.trajectories import Trajectory, Transcript, decision_points
from oel_jax.data.trajectory_files import TrajectoryStore, read
from oel_jax.testing import tiny_config, write_dummy_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_dummy_model(tmp_path_factory.mktemp("dummy") / "model")


def chat_config(model, **changes):
    """A chat round of a model without a system role, in tiny."""
    fields = {
        "game__name": None,
        "logs__heldout": 0.3,
        "extract__place": "user",
        "extract__max_prompt": 1900,
        "evaluate__maps": 128,
        "evaluate__seeds": 10,
    }
    return tiny_config(model_path=str(model), **(fields | changes))


def talk(name, *texts, who=None, feedback=None):
    """A conversation of ours: texts by turns of user and assistant."""
    transcript, messages = Transcript(), []
    for asked, answered in zip(texts[::2], texts[1::2], strict=True):
        messages.append(user(asked))
        turn = transcript.add(messages, answered)
        messages.append(turn.shown)
    return Trajectory(
        policy="round_000", purpose="deploy", turns=transcript.turns, id=name, user=who
    )


def some(count, users=6):
    return [
        talk(f"c{n}", f"question {n}", f"answer {n}", who=f"u{n % users}") for n in range(count)
    ]


@pytest.fixture
def freeze(tmp_path, monkeypatch):
    """Freeze a round of these conversations; returns the workdir."""

    def make(conversations, config, round_number=1):
        monkeypatch.setattr(snapshot, "found", lambda *_: iter(conversations))
        with opened(tmp_path / "run", config, change=True) as run:
            if round_number > 1:  # the policy of the round before
                policy = run.workdir.policy(round_number - 1)
                shutil.copytree(config.model.path, policy, dirs_exist_ok=True)
            files = snapshot.deploy(run, round_number)
            assert all(file.is_file() for file in files)
            return run.workdir

    return make


def sides(workdir, number=1):
    made = read_json(workdir.snapshot(number))["conversations"]
    return {name: one["side"] for name, one in made.items()}


def test_a_user_is_on_one_side_in_all_rounds_and_nothing_held_out_is_learned_from(freeze, model):
    room = {"evaluate__conversations": 100, "deploy__games_per_step": 40}
    config = chat_config(model, rounds=2, **room)
    first = some(40, users=12)
    workdir = freeze(first, config)
    later = [talk(f"d{n}", "more", "yes", who=f"u{n % 12}") for n in range(40)]
    workdir = freeze(first + later, config, 2)
    assert sides(workdir, 1).keys() == {one.id for one in first}
    assert sides(workdir, 2).keys() == {one.id for one in later}  # what was used is not new
    of_user = {}
    for number, talks in ((1, first), (2, later)):
        side = sides(workdir, number)
        for one in talks:
            of_user.setdefault(one.user, set()).add(side[one.id])
    assert {len(found) for found in of_user.values()} == {1}
    assert set().union(*of_user.values()) == {"train", "heldout"}
    for number in (1, 2):
        store = TrajectoryStore(workdir.trajectories(number))
        heldout = {one.user for one in read(workdir.heldout(number))}
        for purpose in ("extract", "deploy"):
            learned = {one.user for file in store.files(purpose) for one in read(file)}
            assert learned and not learned & heldout


def test_what_a_round_has_no_room_for_is_new_to_the_next(freeze, model):
    config = chat_config(model, rounds=3, logs__heldout=1e-9)
    most = config.consolidate.steps * config.deploy.games_per_step
    talks = some(2 * most + 1, users=most)
    used = []
    for number, count in ((1, most), (2, most), (3, 1)):
        if number == 3:  # the last one is alone: the others are used
            config = chat_config(
                model, rounds=3, logs__heldout=1e-9, extract__n=1, extract__n_run=1
            )
        used.append(set(sides(freeze(talks, config, number), number)))
        assert len(used[-1]) == count
        assert read_json(freeze(talks, config, number).snapshot(number))["train"] == count
    assert set.union(*used) == {one.id for one in talks} and sum(map(len, used)) == len(talks)


def test_without_users_conversations_are_split(freeze, model):
    config = chat_config(model, deploy__games_per_step=60, evaluate__conversations=60)
    workdir = freeze([talk(f"c{n}", "hello", "hi") for n in range(60)], config)
    found = list(sides(workdir).values())
    assert 5 <= found.count("heldout") <= 35  # 0.3 of 60 by hash: 18, far from both ends


def test_of_a_conversation_that_grew_the_new_turns_are_taken(freeze, model):
    config = chat_config(model, rounds=2, logs__heldout=1e-9)
    old = [talk(f"c{n}", "first", "one") for n in range(4)]
    freeze(old, config)
    grown = [talk(f"c{n}", "first", "one", "second", "two", "third", "three") for n in range(4)]
    workdir = freeze(grown, config, 2)
    store = TrajectoryStore(workdir.trajectories(2))
    taken = [one for file in store.files("deploy") for one in read(file)]
    assert len(taken) == 4
    for one in taken:
        points = decision_points([one])
        assert [turn.response for turn in one.turns] == ["two", "three"]
        assert [m["content"] for m in points[0].dialogue.messages] == ["first", "one", "second"]
        assert len(points[1].dialogue.messages) == 5


def test_prompts_are_those_that_the_policy_reads(freeze, model):
    workdir = freeze(some(20), chat_config(model))
    tokenizer = load_tokenizer(model)
    store = TrajectoryStore(workdir.trajectories(1))
    learned = [one for file in store.files("deploy") for one in read(file)]
    for point in decision_points(learned):
        ids = render(tokenizer, point.dialogue, thinking=False)
        assert list(point.prompt_ids) == ids
    assert all(one.turns[0].response_ids[-1] in tokenizer.stop_ids for one in learned)


def test_the_share_of_a_user_in_a_chain_is_capped(freeze, model):
    talks = [talk(f"c{n}", "hello", "hi", who="loud") for n in range(50)]
    talks += [talk(f"d{n}", "hello", "hi", who=f"quiet {n}") for n in range(6)]
    fields = {"extract__n": 4, "extract__n_run": 4, "extract__chains": 8, "logs__heldout": 1e-9}
    fields["consolidate__steps"] = 20  # all of them can be learned from
    free = freeze(talks, chat_config(model, **fields))
    share = {"extract__user_share": 0.5}
    assert max(loud(free)) > 2
    shutil.rmtree(free.root)
    capped = freeze(talks, chat_config(model, **fields, **share))
    assert max(loud(capped)) == 2  # 0.5 of 4
    assert len(loud(capped)) == 8
    with pytest.raises(UserError, match=r"of 1 user\(s\).*user_share=0.5"):
        again = [talk(f"e{n}", "hello", "hi", who="loud") for n in range(50)]
        freeze(again, chat_config(model, rounds=2, **fields, **share), 2)


def loud(workdir):
    store = TrajectoryStore(workdir.trajectories(1))
    return [sum(one.user == "loud" for one in read(file)) for file in store.files("extract")]


def test_too_few_are_refused_in_one_message(freeze, model):
    with pytest.raises(UserError, match=r"1 new conversations, .*a chain of knowledge needs 2"):
        freeze(some(1), chat_config(model, logs__heldout=1e-9))


def test_what_does_not_fit_is_counted_and_left_out(freeze, model, capsys):
    long = "word " * 400
    talks = some(20)
    talks.append(talk("long", long, "answer", who="x"))
    talks.append(talk("grows", "short", "answer", long, "answer", who="y"))
    config = chat_config(model, logs__heldout=1e-9, consolidate__steps=20)
    workdir = freeze(talks, config)
    left_out = read_json(workdir.snapshot(1))["left_out"]
    assert left_out == {
        "its first prompt is too long (config.sampler.max_prompt)": 1,
        "of extraction, too long (config.extract.max_prompt)": 1,
        "the end of a conversation, too long (config.sampler.max_prompt)": 1,
    }
    store = TrajectoryStore(workdir.trajectories(1))
    taken = {one.id: one for file in store.files("deploy") for one in read(file)}
    assert len(taken) == 21 and "long" not in taken
    drawn = [one for file in store.files("extract") for one in read(file)]
    assert drawn and "grows" not in {one.id for one in drawn}
    assert taken["grows"].turns[0].feedback == long  # what came next is still what was said
    assert "left out: its first prompt is too long" in capsys.readouterr().out


def test_a_snapshot_is_made_once_and_checked(freeze, model):
    config = chat_config(model)
    workdir = freeze(some(20), config)
    before = contents(workdir.root, "round_001/trajectories/*")
    freeze(some(40), config)
    assert contents(workdir.root, "round_001/trajectories/*") == before
    workdir.snapshot(1).unlink()  # killed before it was complete: made again, nothing old is left
    (workdir.trajectories(1) / "deploy_0009.jsonl").write_text("old")
    freeze(some(20), config)
    assert contents(workdir.root, "round_001/trajectories/*") == before
    with (workdir.trajectories(1) / "deploy_0000.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"deploy_0000.jsonl is not what .*snapshot.json says"):
        freeze(some(20), config)


def test_a_round_waits_for_new_conversations(tmp_path, model, monkeypatch, capsys):
    config = chat_config(model, logs__wait=8, logs__heldout=1e-9)
    root = tmp_path / "run"
    looks = []

    def sleep(_):
        looks.append(1)
        with ConversationStore(root / "conversations") as store:
            for n in range(3):
                store.append_exchange(talk(f"c{len(looks)}-{n}", "hello", "hi"))

    monkeypatch.setattr(snapshot.time, "sleep", sleep)
    with opened(root, config) as run:
        snapshot.deploy(run, 1)
    assert len(looks) == 3
    made = read_json(run.workdir.snapshot(1))
    assert len(made["conversations"]) == 9
    assert "waits for new conversations" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["frozen_lake", "sokoban"])
def test_game_prompts_over_chat_become_games_again(freeze, model, name):
    """A client plays by messages alone; the extractor and the teacher read it as a game."""
    seen, talks = {}, []
    for seed in range(12):
        game, transcript = environments.make(name, seed), Transcript()
        situations = []
        while not game.done:
            situations.append(game.situation())
            transcript.add([user(prompts.play_prompt(situations[-1]))], "[right]")
            game.step("[right]")
        turns = transcript.turns
        turns[-1] = turns[-1].__class__(**{**vars(turns[-1]), "feedback": game.outcome()})
        one = Trajectory(policy="round_000", purpose="deploy", turns=turns, id=f"g{seed}")
        seen[one.id] = situations, game.outcome()
        talks.append(one)
    talks.append(talk("other", "no game", "hi"))
    config = chat_config(
        model,
        logs__wrapper="paper",
        extract__place="paper",
        logs__heldout=1e-9,
        sampler__max_prompt=1000,
        consolidate__token_budget=2048,
        consolidate__steps=20,
    )
    workdir = freeze(talks, config)
    left_out = read_json(workdir.snapshot(1))["left_out"]
    assert left_out == {"a message is not in the paper's wrapper (config.logs.wrapper)": 1}
    store = TrajectoryStore(workdir.trajectories(1))
    taken = [one for file in store.files("deploy") for one in read(file)]
    assert len(taken) == 12
    for one in taken:
        situations, outcome = seen[one.id]
        points = decision_points([one])
        assert [p.dialogue for p in points] == [Dialogue((user(s),), "grid") for s in situations]
        told = history(one)
        assert told.endswith(f"\n\n\n{outcome}\n")
        assert told.count("_Output: [right]") == len(situations)
        rebuilt = situations[0].rstrip("\n")
        for turn, situation in zip(one.turns[1:], situations[1:], strict=True):
            rebuilt += turn.observation  # each round shows what is new, and no more
            assert rebuilt == situation.rstrip("\n")
