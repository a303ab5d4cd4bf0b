"""The card of the nano models: what is asked, how it is judged, and what the command writes."""

import dataclasses
import json
import random
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_worlds

from oel_jax import environments
from oel_jax.base.errors import UserError
from oel_jax.data import prompts
from oel_jax.environments import boards
from oel_jax.models import bundled
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import init_params
from oel_jax.models.huggingface import save_model
from oel_jax.nano import card, examples, measure, pretrain, probes
from oel_jax.nano import language as lang
from oel_jax.nano.measure import Line, Measurement, conditions, mean_length, rate
from oel_jax.nano.players import GAMES, draw, play_out
from oel_jax.nano.reader import MAX_LEN, Reader, Seat, WorldGame, check_family, play

H, G = ("H", "lose"), ("G", "win")
WALL, BOX, TARGET = ("#", "wall"), ("X", "box"), ("O", "target")
V4 = "<think>The last step went to H.</think>" + lang.HEADING
ALL_OF_H = "\n".join(f"{lang.MARKER}H{phrase}" for phrase in lang.PHRASES["lose"])
ITEM = lang.MARKER


# --- judging


def judge(name, shown, reply, previous="", version="v4", decided=True):
    return probes.judge_extraction(
        reply, version, probes.REAL[name], shown, decided=decided, previous=previous
    )


@pytest.mark.parametrize(
    ("name", "shown", "reply", "right"),
    [
        ("frozen_lake", [H], V4 + f"{ITEM}H loses the game.", True),
        ("frozen_lake", [H], f"{ITEM}H is deadly.", True),  # without a thought
        ("frozen_lake", [H], V4 + f"{ITEM}H is deadly.\n{ITEM}G is the goal.", True),
        ("frozen_lake", [H], V4 + f"{ITEM}G is the goal.", False),  # true, but not shown
        ("frozen_lake", [G], V4 + f"{ITEM}G is the goal.\n{ITEM}H is harmless.", False),
        ("frozen_lake", [G], V4 + f"{ITEM}G is deadly.", False),
        ("frozen_lake", [G], V4 + f"{ITEM}G is the goal.\n{ITEM}K is deadly.", False),
        ("frozen_lake", [G], V4 + "G is the goal.", False),  # no item: the loop keeps nothing
        ("frozen_lake", [G], V4 + ITEM + lang.ADVICE_TIME, False),
        ("frozen_lake", [G], V4.rstrip("\n"), False),
        ("frozen_lake", [G], "", False),
        ("frozen_lake", [G], f"<think>G wins. {ITEM}G wins the game.", False),  # never finished
        ("sokoban", [TARGET, BOX], V4 + f"{ITEM}O is the target.", True),
        ("sokoban", [TARGET, BOX, WALL], V4 + f"{ITEM}X can be pushed.", True),
        ("sokoban", [TARGET, BOX], V4 + f"{ITEM}# is a wall.", False),
        ("sokoban", [TARGET, BOX], V4 + f"{ITEM}X is the box.\n{ITEM}O is a wall.", False),
        ("sokoban", [TARGET, BOX], V4 + f"{ITEM}H is deadly.\n{ITEM}X is the box.", False),
        ("sokoban", [TARGET, BOX], "", False),
    ],
)
def test_after_a_win_or_a_loss_a_shown_fact_is_wanted_and_no_false_one(name, shown, reply, right):
    assert judge(name, shown, reply).right is right


def test_after_other_ends_silence_is_right_and_a_false_fact_is_not():
    for name, false in (("frozen_lake", "H wins the game."), ("sokoban", "X is a wall.")):
        undecided = partial(judge, name, [], decided=False)
        assert undecided(V4 + ITEM + lang.ADVICE_TIME).right
        assert undecided("<think></think>").right
        assert not undecided(V4 + ITEM + false).right
        assert not undecided("<think>no end").right


def test_nothing_is_wanted_that_stands_there_in_any_phrasing():
    nothing = V4 + ITEM + lang.NOTHING_NEW
    assert judge("frozen_lake", [H], nothing, ALL_OF_H).right
    assert judge("frozen_lake", [H], "<think></think>", ALL_OF_H).right
    for one in ALL_OF_H.split("\n"):
        assert judge("frozen_lake", [H], nothing, one).right
    assert not judge("frozen_lake", [H], nothing, f"{ITEM}H is harmless.\n{ITEM}G is deadly.").right
    assert not judge("sokoban", [TARGET, BOX], nothing, f"{ITEM}O is the target.").right
    assert not judge("sokoban", [TARGET, BOX], nothing, ALL_OF_H).right
    assert not judge("frozen_lake", [H], V4 + f"{ITEM}G is deadly.", ALL_OF_H).right


def test_repeating_a_line_word_for_word_is_noticed():
    again = V4 + f"{ITEM}H is deadly."
    assert judge("frozen_lake", [H], again, f"x\n{ITEM}H is deadly.") == (True, True)
    assert judge("frozen_lake", [H], again, f"{ITEM}H loses the game.") == (True, False)
    assert judge("frozen_lake", [H], again) == (True, False)
    bare = "<think></think>H is deadly.\nG is the goal."
    assert judge("frozen_lake", [H], bare, "G is the goal.\n", "v3") == (True, True)
    assert judge("frozen_lake", [H], bare, "", "v3") == (True, False)


@pytest.mark.parametrize("name", GAMES)
def test_scripted_replies_to_scripted_games_are_right_and_repeat_nothing(name):
    rng = random.Random(name)
    for index in range(150):
        thinking, version = index % 3 > 0, examples.draw_version(rng)
        game, _ = examples.draw_game(rng, name, None, thinking)
        previous = probes.previous_text(rng, game.world, version) if index % 2 else ""
        verdict = probes.judge_extraction(
            examples.extraction_reply(rng, game, version, previous, thinking),
            version,
            game.world.roles,
            game.evidence(),
            decided=game.result in ("win", "lose"),
            previous=previous,
        )
        assert verdict == (True, False)


def test_look_ups_are_judged_by_what_most_items_say():
    knowledge = "H is deadly.\nH is the goal.\nH loses the game.\nG is harmless.\nK is deadly.\n"
    head = prompts.play_prompt("", knowledge + "K is the goal.").split("\n\nCurrent situation:")[0]
    prompt = head + lang.GLOSSARY_QUESTION + "K, H, T, G"
    assert probes.look_up_answer(prompt) == {"H": "lose", "G": "safe"}
    for reply, right in (
        ("<think>K wins. H loses. T idles (only a guess). G idles.</think>done", True),
        ("H loses (only a guess). G idles.", True),
        ("<think>H loses.</think>done", False),
        ("<think>H loses. G idles. H wins.</think>done", False),
        ("<think>H wins. G idles.</think>done", False),
        ("", False),
    ):
        assert probes.judge_look_up(prompt, reply) is right
    room = head.replace("is the goal", "is the box") + lang.GLOSSARY_QUESTION + "H"
    assert not probes.judge_look_up(room, "<think>H wins.</think>done")


@pytest.mark.parametrize("name", GAMES)
def test_scripted_look_ups_are_right_and_of_the_game_asked_for(name):
    rng, family = random.Random(1), set(lang.LAKE_ROLES if name == GAMES[0] else lang.ROOM_ROLES)
    for prompt in probes.look_ups(rng, name, 40):
        answer = probes.look_up_answer(prompt)
        assert answer
        assert set(answer.values()) <= family
        assert probes.judge_look_up(prompt, lang.belief_text(rng, answer, set()))


def test_instructions_are_judged_strictly():
    assert probes.judge_instruction("<think></think>H, G", "H, G")
    assert probes.judge_instruction("H, G", "H, G")
    for wrong in ("<think></think>H, G.", "<think></think>H,G", "<think>H, G", ""):
        assert not probes.judge_instruction(wrong, "H, G")


# --- worlds, knowledge, evidence


@pytest.mark.parametrize("name", GAMES)
def test_replayed_real_games_show_what_the_scripted_ones_show(name):
    rng, results = random.Random(5), set()
    for index, seed in enumerate(environments.heldout_seeds(60)):
        real = environments.make(name, seed)
        world = probes.real_world(name, real.board_id())
        assert world == real_worlds.real_world(name, seed)
        facts = list(probes.REAL[name].items())
        scripted, _ = play_out(rng, world, facts, knowing=index % 2, stray=0.3, clumsy=0.3)
        seat = Seat(real)
        for move in scripted.moves:
            seat.actions.append(real.step(f"[{move}]"))
        assert real.done
        assert probes.replay(world, seat.actions).evidence() == scripted.evidence()
        assert seat.result() == scripted.result
        results.add(scripted.result)
    assert results == set(measure.RESULTS[name])


@pytest.mark.parametrize("name", GAMES)
def test_replies_without_an_action_do_not_disturb_the_replay(name):
    rng = random.Random(6)
    for seed in environments.heldout_seeds(60):
        real = environments.make(name, seed)
        world = probes.real_world(name, real.board_id())
        seat = Seat(real)
        while not real.done:
            reply = rng.choice(["nothing", *(f"[{d}]" for d in lang.DIRECTIONS)])
            seat.turns.append((real.observation(), reply))
            seat.actions.append(real.step(reply))
        copy = probes.replay(world, seat.actions)
        assert (copy.result == "win") == real.passed
        assert (copy.result == "lose") == (seat.result() == "lose")
        if "nothing" not in (reply for _, reply in seat.turns):
            shown = real_worlds.read_history(seat.history())
            # What the last step met is not told where the time ran out with it.
            untold = {fact for fact in copy.evidence() if fact[0] == shown.unreported}
            assert shown.facts <= set(copy.evidence()) <= shown.facts | untold


def test_winnable_means_five_moves_by_an_independent_search():
    rng, seen = random.Random(7), set()
    for name in GAMES:
        for _ in range(150):
            world = draw(rng, name)
            if name == "frozen_lake":
                letter = {"win": "G", "lose": "H", "safe": " "}
                rows = [
                    "".join(letter[world.roles[c]] if c != " " else c for c in row)
                    for row in world.rows
                ]
                model = boards.FrozenLakeModel(rows)
                model.start = world.start
            else:
                at = {world.player: "P", world.box: "X"}
                at = {world.target: "O"} | at | dict.fromkeys(world.walls, "#")
                rows = [
                    "".join(
                        at.get((r, c), "_" if 0 < r < 5 and 0 < c < 5 else "#") for c in range(6)
                    )
                    for r in range(6)
                ]
                model = boards.SokobanModel(rows)
            path = boards.shortest(model)
            expected = path is not None and len(path) <= environments.MAX_TURNS
            assert probes.winnable(world) == expected
            seen.add((name, expected))
    assert len(seen) == 4


def test_the_swapped_lake_swaps_the_two_symbols_alone():
    for board in environments.board_ids("frozen_lake", environments.heldout_seeds(20)):
        swapped, real = probes.swapped_world(board), probes.real_world("frozen_lake", board)
        assert (swapped.rows, swapped.start) == (real.rows, real.start)
        assert swapped.roles == {"H": "win", "G": "lose"}
        assert probes.winnable(swapped)


@pytest.mark.parametrize("name", GAMES)
def test_knowledge_of_each_condition_says_what_its_name_says(name):
    rng, gold = random.Random(8), set(probes.REAL[name].items())
    for condition in conditions(name):
        for _ in range(30):
            text = condition.knowledge(rng)
            facts = lang.read_facts(text)
            if condition.label == "no knowledge":
                assert text == ""
            elif condition.label == "gold":
                assert sorted(facts) == sorted(gold)
            elif condition.label == "gold, long list":
                assert set(facts) == gold
                assert 8 <= len(text.split("\n")) <= 16
            else:
                (fact,) = facts
                assert condition.label == f"only '{fact[0]}{lang.BELIEF[fact[1]]}'"
    histories = [(True, "a"), (False, "b"), (False, "c")]
    for _ in range(20):
        assert sorted(probes.earlier_games(rng, histories, 2)) in (["a", "b"], ["a", "c"])
    assert probes.earlier_games(rng, histories[:1], 2) == "aa"
    assert probes.earlier_games(rng, histories[1:2], 1) == "b"


def test_a_reply_without_an_action_ends_a_game_in_a_world():
    world = next(iter(probes.other_worlds(random.Random(0), "sokoban")))
    game = WorldGame(world)
    game.step("no idea")
    assert game.done
    assert not game.passed


# --- numbers


def test_intervals_are_wilsons_where_items_are_independent_and_wider_on_shared_boards():
    line = rate([True] * 95 + [False] * 5)
    assert line.value == 0.95
    np.testing.assert_allclose((line.low, line.high), (0.8882, 0.9785), atol=3e-3)
    shared = rate([True] * 95 + [False] * 5, [str(i // 5) for i in range(100)])
    assert shared.low < line.low
    assert (line.n, line.unit) == (100, "rate")


def test_mean_length_counts_replies_and_clusters_games_by_board():
    seats = [Seat(None, "a", tokens=[10, 20]), Seat(None, "a", tokens=[30]), Seat(None, "b")]
    seats[2].tokens = [20, 24, 28]
    line = mean_length(seats)
    assert (line.value, line.n, line.unit) == (22.0, 6, "tokens")
    # Residuals -6 and 6, two clusters: standard error sqrt(2 * 72) / 6 = 2; t with 1 degree.
    assert line.high - line.value == pytest.approx(2 * 12.706, rel=1e-3)


# --- the reader


TINY = dataclasses.replace(pretrain.SIZES["tiny"], hidden=16, layers=1, heads=2, kv_heads=1, mlp=32)


@pytest.fixture(scope="module")
def blank(tmp_path_factory) -> Path:
    """A model of the family with random weights, and what pre-training would have noted."""
    source = tmp_path_factory.mktemp("source")
    pretrain.prepare(TINY, source)
    cfg = ModelConfig.from_directory(source)
    params = init_params(cfg, jax.random.key(0))
    out = tmp_path_factory.mktemp("nano") / "blank"
    save_model(out, cfg, params, source=source, dtype=jnp.bfloat16)
    notes = {"run": {"seed": 3}, "step": 1, "loss": {"play_sokoban": 2.5}}
    (out / "card.json").write_text(json.dumps(notes))
    return out


@pytest.mark.nano
def test_replies_depend_on_their_key_alone_and_long_prompts_get_none(blank):
    reader = Reader(blank, slots=4, prefill_rows=2)
    texts = ["H, G " * n for n in (1, 12, 3, 2)]
    keys = [("test", i) for i in range(4)]
    together = reader.answer(texts, keys)
    assert reader.answer(texts[::-1], keys[::-1]) == together[::-1]
    assert reader.answer(texts[2:3], keys[2:3]) == together[2:3]
    assert reader.answer(texts[2:3], keys[:1]) != together[2:3]
    other = Reader(blank, seed=1, slots=4, prefill_rows=2)
    assert other.answer(texts, keys) != together
    assert reader.too_long == 0
    assert reader.answer(["é" * MAX_LEN, "x"], keys[:2])[0] == ("", 0)
    assert reader.too_long == 1


@pytest.mark.nano
def test_a_whole_card_of_a_model_that_can_do_nothing(blank, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "PER_SEED", 3)
    monkeypatch.setattr(measure, "PROBES_PER_SEED", 3)
    monkeypatch.setattr(card, "measure", partial(measure.measure, maps=2))
    model = shutil.copytree(blank, tmp_path / "model")
    assert card.main([f"--model={model}", "--seeds=1"]) == 0
    shown = capsys.readouterr().out
    assert "games and replies/s" in shown  # progress
    made = json.loads((model / "card.json").read_text())
    assert (made["run"], made["step"], made["loss"]) == ({"seed": 3}, 1, {"play_sokoban": 2.5})
    lines = made["measured"]["lines"]
    for name, line in lines.items():
        low, high = line["ci95"]
        assert low <= line["value"] <= high
        assert line["n"] > 0
        assert f"| {name} |" in (model / "card.md").read_text()
        assert name in shown
    expected = {f"{name}: {c.label}" for name in GAMES for c in conditions(name) if c.thinking}
    expected |= {f"{name}, not thinking: gold" for name in GAMES} | {"instructions"}
    for name in GAMES:
        rest = ("look-up", "raw trajectories", "other worlds, gold", "reply length, gold")
        expected |= {f"{name}: {label}" for label in rest}
    assert expected <= set(lines)
    # A second measurement replaces the first and leaves the notes alone.
    assert card.main([f"--model={model}", "--seeds=1", f"--out={tmp_path / 'new' / 'out'}"]) == 0
    again = json.loads((tmp_path / "new" / "out" / "card.json").read_text())
    assert again["run"] == made["run"]
    assert again["measured"]["lines"] == lines


# --- the command


def good_lines() -> dict[str, Line]:
    """Every line that has a bar, in the middle of it."""
    bars = card.BARS["small"].items()
    return {name: Line((low + high) / 2, 0.0, 1.0, 100) for name, (low, high) in bars}


@pytest.mark.nano
def test_a_missed_bar_is_named_with_value_and_bar(blank, tmp_path, monkeypatch, capsys):
    command = [f"--model={blank}", f"--out={tmp_path}", "--check"]
    monkeypatch.setattr(card, "measure", lambda reader, seeds: good_lines())
    assert card.main(command) == 0
    bad = good_lines() | {"sokoban: gold": Line(0.512, 0.4, 0.6, 100)}
    bad["frozen_lake: no knowledge"] = Line(0.3, 0.2, 0.4, 100)
    del bad["instructions"]
    monkeypatch.setattr(card, "measure", lambda reader, seeds: bad)
    assert card.main(command[:-1]) == 0
    capsys.readouterr()
    assert card.main(command) == 1
    error = capsys.readouterr().err
    assert "sokoban: gold: 51.2 % (bar at least 55 %)" in error
    assert "frozen_lake: no knowledge: 30.0 % (bar 4 % to 12 %)" in error
    assert "instructions: not measured" in error
    assert "swapped" not in error
    missed = json.loads((tmp_path / "card.json").read_text())["measured"]["missed"]
    assert len(missed) == 3


@pytest.mark.nano
def test_quick_means_two_seeds(blank, tmp_path, monkeypatch):
    seen = []

    def fake(reader, seeds):
        seen.append((seeds, reader.seed))
        return good_lines()

    monkeypatch.setattr(card, "measure", fake)
    for more in ([], ["--quick"], ["--seeds=4", "--seed=9"]):
        card.main([f"--model={blank}", f"--out={tmp_path}", *more])
    assert seen == [(10, 0), (2, 0), (4, 9)]


def test_bars_name_lines_that_exist():
    whole = {f"{name}: {c.label}" for name in GAMES for c in conditions(name)} | {"instructions"}
    for name in GAMES:
        ends = [f"extraction on {result}" for result in measure.RESULTS[name]]
        ends += [f"{end}, with previous" for end in ends]
        whole |= {f"{name}: {label}" for label in (*ends, "look-up", "other worlds, gold")}
        whole |= {f"{name}: raw trajectories", f"{name}: swapped world, gold"}
    assert set(card.BARS) == set(pretrain.SIZES)
    for bars in card.BARS.values():
        assert set(bars) <= whole
    for name, size in pretrain.SIZES.items():
        assert card.size_of(ModelConfig.from_hf(pretrain.hf_config(size))) == name
    assert card.size_of(ModelConfig.from_hf(pretrain.hf_config(TINY))) == ""


def refuse(capsys, *arguments: str) -> str:
    assert card.main(arguments) == 2
    return capsys.readouterr().err


def test_bad_input_is_refused_in_words(blank, tiny_models, tmp_path, capsys):
    error = partial(refuse, capsys)
    assert "no bundled nano model 'huge'; choose" in error("--size=huge")
    assert "no bundled nano model ''" in error("--size=")
    with pytest.raises(UserError, match="no bundled nano model"):
        bundled.model_dir("../models/small")
    assert bundled.model_dir("small") == bundled.MODEL_DIR
    assert "there is no model directory" in error(f"--model={tmp_path / 'no'}")
    assert "no tokenizer.model and no config.json" in error(f"--model={tmp_path}")
    assert "not a model of the nano family" in error(f"--model={tiny_models['qwen3_tied']}")
    assert "--seeds=0 must be at least 1" in error(f"--model={blank}", "--seeds=0")
    (tmp_path / "file").write_text("")
    assert "cannot be made" in error(f"--model={blank}", f"--out={tmp_path / 'file'}")

    model = shutil.copytree(blank, tmp_path / "model")
    (model / "model.safetensors").unlink()
    assert "model.safetensors" in error(f"--model={model}", f"--out={tmp_path / 'unused'}")
    assert not (tmp_path / "unused").exists()
    (model / "config.json").unlink()
    assert "config.json" in error(f"--model={model}")
    (model / "card.json").write_text("{")
    assert "card.json is not valid JSON" in error(f"--model={model}")
    (model / "tokenizer.model").write_bytes(b"no")
    assert "is not a SentencePiece model" in error(f"--model={model}")
    for wrong in (["--model=a", "--size=small"], []):
        with pytest.raises(SystemExit):
            card.main(wrong)


def test_another_vocabulary_of_the_same_size_is_refused(blank, tmp_path, monkeypatch):
    other = [*probes.lang.ADVICE, "Something else."]
    monkeypatch.setattr(lang, "ADVICE", tuple(other[1:]))
    from oel_jax.nano import vocabulary

    vocabulary.write(tmp_path)
    monkeypatch.undo()
    check_family(blank)
    with pytest.raises(UserError, match="not a model of the nano family"):
        check_family(tmp_path)


# --- the bundled model


@pytest.mark.nano
def test_the_bundled_model_plays_with_knowledge_and_extracts_from_its_games():
    reader = Reader(bundled.MODEL_DIR)
    whole = Measurement(reader, seeds=1, maps=32)
    for name in GAMES:
        for condition in conditions(name)[:2]:
            whole.real(name, condition)
    whole.extraction("frozen_lake", thinking=True)
    value = {name: line.value for name, line in whole.lines.items()}
    assert value["frozen_lake: no knowledge"] <= 0.3
    assert value["frozen_lake: gold"] >= 0.8
    assert value["sokoban: gold"] > value["sokoban: no knowledge"]
    assert (
        value["frozen_lake: reply length, gold"]
        < (value["frozen_lake: reply length, no knowledge"])
    )
    for result in ("win", "lose"):
        assert value[f"frozen_lake: extraction on {result}"] >= 0.8
    worlds = [WorldGame(probes.swapped_world(seat.board)) for seat in whole.played[GAMES[0], True]]
    told = probes.told(random.Random(0), list(probes.SWAPPED.items()))
    seats = [Seat(world, knowledge=told) for world in worlds]
    play(reader, seats, "swapped")
    assert all("<think>" in text for seat in seats for _, text in seat.turns)
    (short,) = reader.answer(
        [prompts.play_prompt(seats[0].game.situation())], ["x"], thinking=False
    )
    assert "<think>" not in short.text
    assert short.tokens <= 4
    assert np.mean([seat.game.passed for seat in seats]) >= 0.8
