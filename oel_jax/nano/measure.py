"""Measuring a nano model: the lines of its card.

The real games are played on their held-out boards at temperature 0.7, every game with its own
random keys; the model extracts from the games it just played; other skills are asked for in
addition. Every line is a rate (or a mean length) with a 95 % interval: games on one board count as
one cluster (`oel_jax.report.intervals`), and where nothing is shared every item is its own cluster,
which makes the interval Wilson's.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice, zip_longest
from typing import NamedTuple

import numpy as np

from oel_jax import environments
from oel_jax.data import prompts
from oel_jax.environments.seeds import HELDOUT_GAMES
from oel_jax.nano import examples, probes
from oel_jax.nano import language as lang
from oel_jax.nano.players import GAMES
from oel_jax.nano.reader import Reader, Seat, WorldGame, play
from oel_jax.report.intervals import board_clustered_interval, student_t_quantile
from oel_jax.runs.console import Progress

RESULTS = {"frozen_lake": ("win", "lose", "time", "invalid"), "sokoban": ("win", "time", "invalid")}
# Games in a prompt with raw trajectories: as many as pre-training shows at most.
RAW_GAMES = {"frozen_lake": 2, "sokoban": 1}
PER_SEED = 20  # extractor calls per seed, for each result with and without previous knowledge
PROBES_PER_SEED = 50  # look-ups of each game, instructions


class Line(NamedTuple):
    """One measured number: `value` (a fraction, or tokens) with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    unit: str = "rate"


def rate(hits: Sequence[bool], clusters: Sequence[str] | None = None) -> Line:
    """A fraction; items with equal entries in `clusters` are one cluster (default: none are)."""
    clusters = [str(i) for i in range(len(hits))] if clusters is None else clusters
    return Line(*board_clustered_interval(np.array([hits]), clusters), len(hits))


def mean_length(seats: Sequence[Seat]) -> Line:
    """Mean reply length in tokens, games on one board as a cluster; n counts replies."""
    sums: dict[str, np.ndarray] = {}
    for seat in seats:
        sums[seat.board] = sums.get(seat.board, 0) + np.array([sum(seat.tokens), len(seat.tokens)])
    tokens, counts = np.array(list(sums.values()), np.float64).T
    mean, clusters = tokens.sum() / counts.sum(), len(counts)
    half = 0.0
    if clusters > 1:
        spread = math.sqrt(clusters / (clusters - 1) * ((tokens - mean * counts) ** 2).sum())
        effective = counts.sum() ** 2 / (counts**2).sum()
        half = student_t_quantile(0.975, max(effective - 1, 1.0)) * spread / counts.sum()
    return Line(float(mean), float(mean - half), float(mean + half), int(counts.sum()), "tokens")


# --- the measurement


@dataclasses.dataclass(frozen=True)
class Condition:
    """How the real game is played for one line.

    Attributes:
      knowledge: draws the text in the prompt of one game.
      share: of the seeds; the lines that others are compared with get them all.
    """

    label: str
    knowledge: Callable[[random.Random], str]
    share: float = 0.5
    thinking: bool = True


def conditions(name: str) -> list[Condition]:
    """All conditions of a real game."""
    facts = tuple(probes.REAL[name].items())
    gold = partial(probes.told, facts=facts)
    found = [
        Condition("no knowledge", lambda rng: "", 1.0),
        Condition("gold", gold, 1.0),
        Condition("gold, long list", partial(probes.told_at_length, facts=facts)),
    ]
    for symbol, role in facts:
        one = partial(probes.told, facts=((symbol, role),))
        found.append(Condition(f"only '{symbol}{lang.BELIEF[role]}'", one))
    found.append(Condition("no knowledge", lambda rng: "", thinking=False))
    found.append(Condition("gold", gold, thinking=False))
    return found


def _mode(thinking: bool) -> str:
    return "" if thinking else ", not thinking"


class Measurement:
    """The lines of a card, as they are measured.

    Attributes:
      lines: by name, in the order of measuring.
      played: all real games so far, by game and mode.
    """

    def __init__(self, reader: Reader, seeds: int, maps: int, progress: Progress | None = None):
        self.reader, self.seeds, self.maps = reader, seeds, maps
        self.lines: dict[str, Line] = {}
        self.played: dict[tuple[str, bool], list[Seat]] = {}
        self._progress = progress

    def count(self) -> int:
        """Games and other replies that all lines take: the work for the progress display."""
        real = sum(self._plays(c.share) for name in GAMES for c in conditions(name))
        further = self._plays(0.5) * 5  # raw and other worlds of both games, swapped
        classes = sum(2 * len(RESULTS[name]) + len(self._judged(name, False)) for name in GAMES)
        return real + further + classes * self._cap() + 3 * PROBES_PER_SEED * self.seeds

    def _done(self, count: int) -> None:
        if self._progress:
            self._progress.update(count)

    def _plays(self, share: float) -> int:
        """Games of a line that gets this share of the seeds: whole plays of all boards."""
        return self.maps * math.ceil(self.seeds * share)

    def _cap(self) -> int:
        return PER_SEED * self.seeds

    @staticmethod
    def _judged(name: str, thinking: bool) -> tuple[str, ...]:
        """Results after which extraction is measured."""
        return tuple(r for r in RESULTS[name] if thinking or r in ("win", "lose"))

    def _rng(self, *words: object) -> random.Random:
        return random.Random(" ".join(map(str, ("nano card", self.reader.seed, *words))))

    def _real_seats(self, name: str, plays: int, knowledge: Callable[[], str]) -> list[Seat]:
        seeds = environments.heldout_seeds(self.maps) * (plays // self.maps)
        started = [environments.make(name, seed) for seed in seeds]
        return [Seat(game, game.board_id(), knowledge()) for game in started]

    def _play(self, name: str, label: str, seats: Sequence[Seat], thinking: bool = True) -> None:
        play(self.reader, seats, f"{name} {label}", thinking=thinking, finished=self._done)
        line = rate([seat.game.passed for seat in seats], [seat.board for seat in seats])
        self.lines[f"{name}{_mode(thinking)}: {label}"] = line

    def real(self, name: str, condition: Condition) -> None:
        """Play the real game under one condition."""
        rng = self._rng(name, condition.label, condition.thinking)
        plays = self._plays(condition.share)
        seats = self._real_seats(name, plays, lambda: condition.knowledge(rng))
        self._play(name, condition.label, seats, condition.thinking)
        self.played.setdefault((name, condition.thinking), []).extend(seats)
        if condition.label in ("no knowledge", "gold") and condition.thinking:
            self.lines[f"{name}: reply length, {condition.label}"] = mean_length(seats)

    def raw(self, name: str) -> None:
        """Whole earlier games of the model in place of knowledge."""
        rng = self._rng(name, "raw")
        earlier = [(seat.game.passed, seat.history()) for seat in self.played[name, True]]
        draw = partial(probes.earlier_games, rng, earlier, RAW_GAMES[name])
        self._play(name, "raw trajectories", self._real_seats(name, self._plays(0.5), draw))

    def other(self, name: str) -> None:
        """Worlds with other symbols, told what they do; every world is played once."""
        rng = self._rng(name, "other worlds")
        worlds = islice(probes.other_worlds(rng, name), self._plays(0.5))
        seats = [
            Seat(WorldGame(world), str(i), probes.told(rng, tuple(world.roles.items())))
            for i, world in enumerate(worlds)
        ]
        self._play(name, "other worlds, gold", seats)

    def swapped(self) -> None:
        """Frozen Lake boards on which H wins and G loses, told so."""
        rng = self._rng("swapped")
        boards = environments.board_ids("frozen_lake", environments.heldout_seeds(self.maps))
        facts = tuple(probes.SWAPPED.items())
        seats = [
            Seat(WorldGame(probes.swapped_world(board)), board, probes.told(rng, facts))
            for board in boards * (self._plays(0.5) // self.maps)
        ]
        self._play("frozen_lake", "swapped world, gold", seats)

    def extraction(self, name: str, thinking: bool) -> None:
        """The extractor on the real games just played, by their result."""
        rng = self._rng(name, "extraction", thinking)
        cases: list[Case] = []
        for result in self._judged(name, thinking):
            having = [s for s in self.played[name, thinking] if s.result() == result]
            rng.shuffle(having)
            for previous in (False, True) if thinking else (False,):
                # Other games where there are enough, else the same ones again.
                some = (having[self._cap() :] + having)[: self._cap()] if previous else having
                cases += [Case.draw(rng, name, seat, previous) for seat in some[: self._cap()]]
                self._done(max(0, self._cap() - len(some)))
        replies = self.reader.answer(
            [case.prompt() for case in cases],
            [("extract", name, thinking, i) for i in range(len(cases))],
            thinking=thinking,
        )
        found: dict[str, list[tuple[bool, str]]] = {}
        for case, reply in zip(cases, replies, strict=True):
            verdict = case.judge(reply.text)
            label = f"extraction on {case.seat.result()}"
            hits = {label + (", with previous" if case.previous else ""): verdict.right}
            hits |= {"repeats a previous line": verdict.repeats} if case.previous else {}
            for key, hit in hits.items():
                found.setdefault(key, []).append((hit, case.seat.board))
        # The rate of repetitions comes last.
        for key in sorted(found, key=lambda key: key.startswith("repeats")):
            hits, boards = zip(*found[key], strict=True)
            self.lines[f"{name}{_mode(thinking)}: {key}"] = rate(hits, boards)
        self._done(len(cases))

    def look_up(self, name: str) -> None:
        """Recite roles from a list of items."""
        rng = self._rng(name, "look-up")
        asked = probes.look_ups(rng, name, PROBES_PER_SEED * self.seeds)
        replies = self.reader.answer(asked, [("look-up", name, i) for i in range(len(asked))])
        hits = [probes.judge_look_up(p, r.text) for p, r in zip(asked, replies, strict=True)]
        self.lines[f"{name}: look-up"] = rate(hits)
        self._done(len(asked))

    def instructions(self) -> None:
        """Tiny tasks with one right answer."""
        rng = self._rng("instructions")
        tasks = [examples.instruction(rng) for _ in range(PROBES_PER_SEED * self.seeds)]
        keys = [("instruction", i) for i in range(len(tasks))]
        replies = self.reader.answer([text for text, _ in tasks], keys)
        hits = [
            probes.judge_instruction(reply.text, answer)
            for (_, answer), reply in zip(tasks, replies, strict=True)
        ]
        self.lines["instructions"] = rate(hits)
        self._done(len(tasks))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the extractor: a real game that is over, and what it is shown in addition."""

    name: str
    seat: Seat
    version: str
    previous: str

    @classmethod
    def draw(cls, rng: random.Random, name: str, seat: Seat, previous: bool) -> "Case":
        """Draw template version (v4 mostly, v3 sometimes) and previous knowledge."""
        version = examples.draw_version(rng)
        world = probes.real_world(name, seat.board)
        text = probes.previous_text(rng, world, version) if previous else ""
        return cls(name, seat, version, text)

    def prompt(self) -> str:
        """The paper's extraction prompt."""
        history = self.seat.history()
        return prompts.extraction_prompt(history, self.previous, version=self.version)

    def judge(self, reply: str) -> probes.Verdict:
        """What the reply is worth."""
        world = probes.real_world(self.name, self.seat.board)
        return probes.judge_extraction(
            reply,
            self.version,
            world.roles,
            probes.replay(world, self.seat.actions).evidence(),
            decided=self.seat.result() in ("win", "lose"),
            previous=self.previous,
        )


def measure(reader: Reader, seeds: int, maps: int = HELDOUT_GAMES) -> dict[str, Line]:
    """All lines of the card, games first; prints progress.

    Args:
      seeds: plays of each board in the main lines (half of them in the others).
      maps: how many of the 128 held-out boards.
    """
    whole = Measurement(reader, seeds, maps)
    with Progress(whole.count(), "games and replies", "card", every=15.0) as progress:
        whole = Measurement(reader, seeds, maps, progress)
        # The games take turns, so that the rate shown says something about the rest.
        plans = [[(name, c) for c in conditions(name)] for name in GAMES]
        for name, condition in filter(None, chain.from_iterable(zip_longest(*plans))):
            whole.real(name, condition)
        for name in GAMES:
            for thinking in (True, False):
                whole.extraction(name, thinking)
            whole.raw(name)
            whole.other(name)
            whole.look_up(name)
        whole.swapped()
        whole.instructions()
    return whole.lines
