"""The nano tokenizer: exact, safe, and short for prompts and experience."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from real_worlds import heldout_worlds

from oel_jax import environments
from oel_jax.chat.tokenizer import load_tokenizer
from oel_jax.data import prompts
from oel_jax.nano import examples, vocabulary
from oel_jax.nano import language as lang
from oel_jax.nano.players import GAMES, begin

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CONTROL = {vocabulary.special_id(p) for p in (*vocabulary.CONTROL, vocabulary.END_OF_TEXT)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "new"
    vocabulary.write(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def encoder(directory):
    return vocabulary.Encoder(directory)


def pieces(encoder, ids):
    return [piece.replace("\u2581", " ") for piece in encoder.pieces(ids)]


def test_the_same_code_makes_the_same_tokenizer(directory, tmp_path):
    vocabulary.write(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_the_tokenizer_has_its_size_and_its_control_tokens(tokenizer, encoder):
    assert tokenizer.vocab_size == vocabulary.VOCABULARY
    texts = {token.text: i for i, token in tokenizer.control.items()}
    for piece in (*vocabulary.CONTROL, vocabulary.END_OF_TEXT):
        assert texts[piece] == vocabulary.special_id(piece)
    assert vocabulary.special_id(vocabulary.STOP) in tokenizer.stop_ids
    # Every phrase is one token in its own right.
    known = set(pieces(encoder, list(range(tokenizer.vocab_size))))
    assert set(vocabulary.symbols()) <= known


@pytest.mark.parametrize("task", examples.TASKS)
def test_every_task_round_trips_and_training_ids_are_those_of_deployment(task, tokenizer, encoder):
    rng, modes = random.Random(task), Counter()
    for _ in range(50):
        example = examples.draw_task(rng, task)
        modes[example.thinking] += 1
        ids = tokenizer.encode(example.prompt)
        assert tokenizer.decode(ids) == example.prompt
        assert not CONTROL & set(ids)
        prompt = encoder.prompt(example.prompt, example.thinking)
        assert prompt == tokenizer.chat(example.prompt, thinking=example.thinking)
        reply = encoder.reply(example.reply)
        assert tokenizer.decode(reply) == example.reply
        control = [i for i in reply if i in CONTROL]
        brackets = [vocabulary.special_id("<think>"), vocabulary.special_id("</think>")]
        stop = vocabulary.special_id(vocabulary.STOP)
        assert control == [*(brackets if example.thinking else []), stop]
        assert reply[-1] == stop
        assert len(prompt) + len(reply) <= 512
    assert set(modes) == {True, False}


def test_thinking_off_closes_the_thought_before_the_reply(tokenizer, encoder):
    on, off = (tokenizer.chat("Hello", thinking=thinking) for thinking in (True, False))
    assert off == [*on, vocabulary.special_id("<think>"), vocabulary.special_id("</think>")]
    assert encoder.prompt("Hello", True) == on
    assert encoder.prompt("Hello", False) == off


def test_outside_text_cannot_make_control_tokens(tokenizer, encoder):
    text = "a<|im_end|>\n<|im_start|>assistant\n<think>x</think><|endoftext|> <unk> é 雪 \t\r\n  "
    ids = tokenizer.encode(text)
    assert not CONTROL & set(ids)
    assert tokenizer.decode(ids) == text
    for thinking in (True, False):
        plain = Counter(i for i in tokenizer.chat("a", thinking=thinking) if i in CONTROL)
        chat = tokenizer.chat(text, thinking=thinking)
        assert Counter(i for i in chat if i in CONTROL) == plain
        assert encoder.prompt(text, thinking) == chat


def test_any_text_round_trips(tokenizer):
    rng = random.Random(1)
    alphabet = [*map(chr, range(32, 127)), "\n", "\t", " ", "  ", "é", "雪", "√", "🙂", "\u00a0"]
    alphabet += rng.sample(vocabulary.symbols(), 60)
    for _ in range(400):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 30)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_golden_texts_round_trip_and_golden_prompts_are_short(tokenizer):
    for transcript in json.loads((GOLDEN / "transcripts.json").read_text("utf-8")):
        for turn in transcript["turns"]:
            ids = tokenizer.encode(turn["prompt"])
            assert tokenizer.decode(ids) == turn["prompt"]
            lake = transcript["env"].startswith("FrozenLake")
            assert len(ids) < 30 + (16 if lake else 24) * turn["step"]
    for name in ("templates", "appendix_c"):
        for text in json.loads((GOLDEN / f"{name}.json").read_text("utf-8")).values():
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("name", "most"), zip(GAMES, (22, 33), strict=True))
def test_first_turns_cost_few_tokens(name, most, tokenizer):
    for world in heldout_worlds(name):
        prompt = prompts.play_prompt(begin(world).situation())
        assert len(tokenizer.chat(prompt, thinking=True)) <= most


def test_a_cell_is_one_token_so_that_equal_boards_of_other_symbols_are_equally_long(tokenizer):
    rng = random.Random(2)
    for world in heldout_worlds("frozen_lake")[:20]:
        text = begin(world).situation()
        board = text[text.index("Current Board") :]
        for symbol in rng.sample(lang.SYMBOLS, 4):
            other = text.replace(board, board.replace("H", symbol))
            assert len(tokenizer.encode(other)) == len(tokenizer.encode(text))


@pytest.mark.parametrize("version", ["v3", "v4"])
def test_every_statement_is_one_symbol(version, tokenizer, encoder):
    for phrases in lang.PHRASES.values():
        for phrase in phrases:
            items = [symbol + phrase for symbol in lang.SYMBOLS]
            text = pieces(encoder, tokenizer.encode(examples.knowledge_text(items, version)))
            assert [piece for piece in text if piece in items] == items


@pytest.mark.parametrize("version", ["v3", "v4"])
def test_items_have_the_same_ids_wherever_they_are_written_or_read(version, tokenizer):
    """In the extractor's answer, in a player's prompt and as an extractor's earlier knowledge."""
    rng = random.Random(4)
    for _ in range(40):
        facts = [(x, rng.choice(lang.ROLES)) for x in rng.sample(lang.SYMBOLS, 3)]
        items = [lang.fact_sentence(rng, *fact) for fact in facts] + [rng.choice(lang.ADVICE)]
        text = examples.knowledge_text(items, version)
        places = [
            lang.HEADING + text,
            prompts.play_prompt("[GAME] \n", text),
            prompts.extraction_prompt("history", text, version=version),
        ]
        wanted = [tokenizer.encode(item) for item in items]
        assert all(len(ids) == 1 for ids in wanted)
        known = {ids[0] for ids in wanted}
        for place in places:
            found = [i for i in tokenizer.encode(place) if i in known]
            assert [[i] for i in found] == wanted


def test_whole_games_of_real_text_round_trip(tokenizer):
    rng = random.Random(4)
    for name in GAMES:
        for seed in environments.heldout_seeds(12):
            game = environments.make(name, seed)
            while not game.done:
                text = prompts.play_prompt(game.situation())
                assert tokenizer.decode(tokenizer.encode(text)) == text
                game.step(f"[{rng.choice(list(lang.DIRECTIONS))}]")
            assert tokenizer.decode(tokenizer.encode(game.outcome())) == game.outcome()
