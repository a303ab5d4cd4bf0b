"""Measure a nano model: what it does without knowledge, with some, with all, and as extractor.

    python -m oel_jax.nano.card --model=DIR [--seeds=10] [--check] [--save]

Plays the real Frozen Lake on the 128 held-out boards at temperature 0.7 (every game with keys of
its own) and, beside it, other worlds. Every line gives a fraction, its sample size and a 95 %
interval (Wilson). `--check` exits 1 when a line misses its bar; `--save` adds the lines to
DIR/card.json.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from oel_jax import games, prompts
from oel_jax.errors import UserError
from oel_jax.games import parse_action
from oel_jax.lm.config import ModelConfig
from oel_jax.lm.huggingface import load_params
from oel_jax.lm.sampler import Request, Sampler, request_key
from oel_jax.lm.sampling import Sampling
from oel_jax.lm.tokenizer import load_tokenizer
from oel_jax.nano import examples
from oel_jax.nano import language as lang
from oel_jax.nano.worlds import Lake, World, draw_world
from oel_jax.parallel.mesh import make_mesh

REAL = {"H": "lose", "G": "win"}
BARS: dict[str, tuple[float, float]] = {
    "no knowledge": (0.04, 0.12),
    "gold, two items": (0.90, 1.0),
    "gold, long list": (0.90, 1.0),
    "other worlds, gold": (0.90, 1.0),
    "swapped world, gold": (0.90, 1.0),
    "extraction on win": (0.95, 1.0),
    "extraction on lose": (0.95, 1.0),
}
Turns = list[tuple[str, str]]


class Reader:
    """A model directory ready to answer prompts in batches."""

    def __init__(self, directory: Path, *, slots: int = 64, max_len: int = 768):
        cfg = ModelConfig.from_directory(directory)
        self.tokenizer = load_tokenizer(directory)
        if cfg.family != "qwen3" or cfg.vocab_size > 4096:
            raise UserError(f"{directory} is not a model of the nano family")
        mesh = make_mesh(1, 1, jax.devices()[:1])
        self.params = load_params(directory, cfg, mesh=mesh, dtype=jnp.float32)
        self._sampler = Sampler(
            cfg,
            mesh,
            slots=slots,
            max_len=max_len,
            max_new=64,
            how=Sampling(),
            limit=self.tokenizer.vocab_size,
            stop_ids=self.tokenizer.stop_ids,
            prefill_rows=32,
        )

    def answer(self, texts: Sequence[str], keys: Sequence[tuple[object, ...]]) -> list[list[int]]:
        """Token ids of one reply per user message, drawn at temperature 0.7 with its own key."""
        requests = [
            Request(self.tokenizer.chat(text, thinking=True), request_key(*key), 64)
            for text, key in zip(texts, keys, strict=True)
        ]
        return [done.ids for done in self._sampler.generate(self.params, requests)]


class WorldGame:
    """A world behind the same calls as a real game."""

    def __init__(self, world: World):
        self.lake = Lake(world)

    @property
    def done(self) -> bool:
        """Whether the game is over."""
        return self.lake.done

    @property
    def passed(self) -> bool:
        """Whether it was won."""
        return self.lake.result == "win"

    def situation(self) -> str:
        """{obs} of spec 4.3."""
        return self.lake.situation()

    def observation(self) -> str:
        """News of this turn."""
        return self.lake.observation()

    def outcome(self) -> str:
        """Outcome text."""
        return self.lake.outcome()

    def step(self, response: str) -> str:
        """Play the parsed action; a reply without one counts as going up."""
        action = parse_action(response)
        self.lake.step(action[1:-1] if action[1:-1] in lang.DIRECTIONS else "up")
        return action


def play(
    reader: Reader, started: Sequence[Any], knowledge: Sequence[str], label: str
) -> tuple[list[Turns], float]:
    """Play all games to their end; returns their turns and the mean reply length in tokens."""
    turns: list[Turns] = [[] for _ in started]
    tokens, replies = 0, 0
    for turn in range(games.MAX_TURNS):
        live = [i for i, game in enumerate(started) if not game.done]
        texts = [prompts.play_prompt(started[i].situation(), knowledge[i]) for i in live]
        ids = reader.answer(texts, [("card", label, i, turn) for i in live])
        for i, reply in zip(live, ids, strict=True):
            text = reader.tokenizer.decode(reply)
            turns[i].append((started[i].observation(), text))
            started[i].step(text)
            tokens, replies = tokens + len(reply), replies + 1
    return turns, tokens / max(replies, 1)


def real_result(game: Any) -> str:
    """'win', 'lose', 'time' or 'invalid' of a finished game, from its outcome text."""
    text = game.outcome()
    if "Final Result" not in text:
        return "time"
    return "win" if game.passed else "lose" if "hole" in text else "invalid"


def extraction(
    reader: Reader, started: Sequence[Any], turns: Sequence[Turns], previous: Sequence[str]
) -> dict[str, list[bool]]:
    """By result of the (real) game: whether the items written are right.

    Right means: after a win or a loss at least one fact and none that is false in the real game;
    after any other end no false fact.
    """
    texts = [
        prompts.extraction_prompt(prompts.extraction_history(t, g.outcome()), e, version="v4")
        for g, t, e in zip(started, turns, previous, strict=True)
    ]
    ids = reader.answer(texts, [("card extraction", i) for i in range(len(texts))])
    found: dict[str, list[bool]] = {}
    for game, reply in zip(started, ids, strict=True):
        facts = lang.read_facts(reader.tokenizer.decode(reply).split("</think>")[-1])
        result = real_result(game)
        needed = result not in ("win", "lose") or bool(facts)
        found.setdefault(result, []).append(needed and all(REAL.get(x) == r for x, r in facts))
    return found


def wilson(count: int, total: int) -> list[float]:
    """95 % interval of a fraction."""
    if total == 0:
        return [0.0, 1.0]
    z, p = 1.96, count / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
    return [round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)]


def _items(rng: random.Random, facts: Sequence[tuple[str, str]], count: int) -> str:
    drawn = list(facts) + [rng.choice(list(facts)) for _ in range(count - len(facts))]
    rng.shuffle(drawn)
    return examples.knowledge_text([lang.fact_sentence(rng, *f) for f in drawn], "v4")


def measure(
    reader: Reader, seeds: int, say: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """All lines of the card; `seeds` plays of the 128 held-out boards each."""
    card: dict[str, dict[str, Any]] = {}

    def line(name: str, hits: Sequence[bool], **more: float) -> None:
        total = len(hits)
        card[name] = {"rate": round(sum(hits) / max(total, 1), 4), "n": total}
        card[name] |= {"ci95": wilson(sum(hits), total), **more}
        say(f"{name:32s} {card[name]}")

    gold, rng = tuple(REAL.items()), random.Random("nano card")
    knowledge: dict[str, Callable[[], str]] = {
        "no knowledge": lambda: "",
        "only 'H loses'": lambda: _items(rng, gold[:1], rng.randint(1, 6)),
        "only 'G wins'": lambda: _items(rng, gold[1:], rng.randint(1, 6)),
        "gold, two items": lambda: _items(rng, gold, 2),
        "gold, long list": lambda: _items(rng, gold, rng.randint(5, 20)),
    }
    kept: list[tuple[Any, Turns]] = []
    for name, text in knowledge.items():
        started = [
            games.make("frozen_lake", s) for s in games.heldout_seeds() for _ in range(seeds)
        ]
        turns, length = play(reader, started, [text() for _ in started], name)
        line(name, [game.passed for game in started], reply_tokens=round(length, 1))
        kept += list(zip(started, turns, strict=True))
    started, turns = [g for g, _ in kept], [t for _, t in kept]
    previous = ["" if rng.random() < 0.5 else _items(rng, gold, rng.randint(2, 15)) for _ in kept]
    found = extraction(reader, started, turns, previous)
    for result in ("win", "lose", "time", "invalid"):
        if result in found:
            line(f"extraction on {result}", found[result])
    _other_worlds(reader, rng, 128 * seeds, line)
    return card


def _other_worlds(
    reader: Reader, rng: random.Random, count: int, line: Callable[..., None]
) -> None:
    """Worlds with other letters, and the real boards with the two roles swapped."""
    drawn: list[World] = []
    while len(drawn) < count:
        world = draw_world(rng)
        if "win" in world.roles.values():
            drawn.append(world)
    swapped = [
        World(
            tuple(games.make("frozen_lake", s).board_id().replace("P", " ").split("/")),
            (0, 0),
            {"H": "win", "G": "lose"},
        )
        for s in games.heldout_seeds()
    ] * (count // 128)
    for name, worlds in (("other worlds, gold", drawn), ("swapped world, gold", swapped)):
        started = [WorldGame(world) for world in worlds]
        texts = [_items(rng, tuple(world.roles.items()), len(world.roles)) for world in worlds]
        play(reader, started, texts, name)
        line(name, [game.passed for game in started])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--seeds", type=int, default=10, help="plays of each held-out board")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--save", action="store_true", help="add the lines to DIR/card.json")
    options = parser.parse_args()
    card = measure(Reader(options.model), options.seeds)
    if options.save:
        path = options.model / "card.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, "measured": card}, indent=2) + "\n")
    missed = [n for n, (a, b) in BARS.items() if not a <= card.get(n, {"rate": -1})["rate"] <= b]
    if options.check and missed:
        sys.exit("below its bar: " + ", ".join(missed))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
