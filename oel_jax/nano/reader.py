"""A nano model that answers prompts in batches, and whole games played by it.

reader = Reader(directory)
replies = reader.answer(["..."], [("some", "key")])
play(reader, [Seat(games.make("sokoban", seed))], "no knowledge")
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import sentencepiece

from oel_jax import environments
from oel_jax.base.errors import UserError
from oel_jax.data import prompts
from oel_jax.environments import NO_ACTION, parse_action
from oel_jax.models.language_model import load_model
from oel_jax.nano import vocabulary
from oel_jax.nano.players import AnyWorld, begin
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.sampler.sampler import Sampler

TEMPERATURE = 0.7
MAX_REPLY = 64  # tokens; the scripted player's longest reply has 50
MAX_LEN = 1024  # prompt and reply; whole games in a prompt take up to about 800


def check_family(directory: Path) -> None:
    """Whether a directory holds a model of the nano family: one that reads the nano vocabulary.

    Size says nothing here, and the vocabulary is compared piece by piece, since a model of an
    earlier vocabulary would answer too, but with nonsense.

    Raises:
      UserError: the directory or its tokenizer is missing, damaged, or another one.
    """
    if not directory.is_dir():
        raise UserError(f"there is no model directory {directory}")
    path = directory / "tokenizer.model"
    if not path.is_file():
        raise UserError(
            f"{directory} is not a model of the nano family: it has no tokenizer.model"
            + ("" if (directory / "config.json").is_file() else " and no config.json")
        )
    found = sentencepiece.SentencePieceProcessor()
    try:
        found.LoadFromSerializedProto(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from error
    if _pieces(found) != _nano_pieces():
        raise UserError(
            f"{directory} is not a model of the nano family, or one of another version of this "
            "code: its tokenizer.model is not the one that oel_jax.nano.vocabulary makes"
        )


def _pieces(model: sentencepiece.SentencePieceProcessor) -> list[tuple[str, bool]]:
    return [(model.IdToPiece(i), model.IsControl(i)) for i in range(model.GetPieceSize())]


@cache
def _nano_pieces() -> list[tuple[str, bool]]:
    """Every piece of today's vocabulary, and whether it is a control token (takes 0.1 s)."""
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(vocabulary.train(vocabulary.corpus()))
    return _pieces(model)


class Reply(NamedTuple):
    """Text (thought brackets kept) and length in tokens, the stop token included."""

    text: str
    tokens: int


class Reader:
    """A model of the nano family that is loaded and ready.

    Attributes:
      seed: goes into every random key, so another seed repeats a measurement independently.
      too_long: prompts so far that did not fit and got the empty reply.
    """

    def __init__(self, directory: Path, *, seed: int = 0, slots: int = 64, prefill_rows: int = 16):
        """Load it.

        Raises:
          UserError: not of the nano family, or its files are missing or damaged.
        """
        check_family(directory)
        self.model = load_model(directory.resolve())
        self.seed, self.too_long = seed, 0
        self._sampler = Sampler(
            self.model.cfg,
            self.model.mesh,
            SamplerConfig(
                slots=slots,
                length=MAX_LEN,
                response=MAX_REPLY,
                # Replies have 20 to 40 tokens: a finished one waits for at most seven steps.
                decode_steps=8,
                prefill_rows=prefill_rows,
            ),
            sampling=Sampling(temperature=TEMPERATURE),
            limit=self.model.vocab_limit,
            stop_ids=self.model.tokenizer.stop_ids,
        )

    def answer(
        self,
        texts: Sequence[str],
        keys: Sequence[tuple[object, ...]],
        *,
        thinking: bool = True,
    ) -> list[Reply]:
        """One reply per user message, drawn at temperature 0.7 with its own key.

        A prompt that does not fit (a model that rambles makes long games) gets the empty reply.
        """
        encode, decode = self.model.tokenizer.chat, self.model.tokenizer.decode
        ids = [encode(text, thinking=thinking) for text in texts]
        # Neighbours of equal length share a prefill batch; keys make the order irrelevant.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        fits = [i for i in order if len(ids[i]) + MAX_REPLY <= MAX_LEN]
        self.too_long += len(ids) - len(fits)
        requests = [
            Request(ids[i], request_key("card", self.seed, *keys[i]), MAX_REPLY) for i in fits
        ]
        replies = [Reply("", 0)] * len(ids)
        done = self._sampler.generate(self.model.params, requests)
        for i, completion in zip(fits, done, strict=True):
            replies[i] = Reply(decode(completion.ids), len(completion.ids))
        return replies


class Playable(Protocol):
    """The part of `games.Game` that playing needs."""

    @property
    def done(self) -> bool: ...
    @property
    def passed(self) -> bool: ...
    def situation(self) -> str: ...
    def observation(self) -> str: ...
    def step(self, response: str) -> str: ...
    def outcome(self) -> str: ...


class WorldGame:
    """A nano world with the calls of a real game.

    A reply without an action ends it, lost (a real game forgives the first one).
    """

    def __init__(self, world: AnyWorld):
        self._game = begin(world)
        self._forfeit = False
        self.situation, self.observation = self._game.situation, self._game.observation
        self.outcome = self._game.outcome

    @property
    def done(self) -> bool:
        """Whether the game is over."""
        return self._game.done or self._forfeit

    @property
    def passed(self) -> bool:
        """Whether it was won."""
        return self._game.result == "win"

    def step(self, response: str) -> str:
        """Play the parsed action and return it."""
        action = parse_action(response)
        if action == NO_ACTION:
            self._forfeit = True
        else:
            self._game.step(action[1:-1])
        return action


@dataclasses.dataclass
class Seat:
    """One game, played by the model.

    Attributes:
      game: a fresh one; over after `play`.
      board: the cluster of its confidence interval; games on one board share it.
      knowledge: part of the prompt of every turn.
      turns: (observation, whole reply) of each turn.
      actions: what was sent to the game, '[up]' for instance.
      tokens: length of each reply, the stop token included.
    """

    game: Playable
    board: str = ""
    knowledge: str = ""
    turns: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    actions: list[str] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)

    def result(self) -> str:
        """'win', 'lose', 'time' or 'invalid', from what the game says of its end."""
        text = self.game.outcome()
        if "Final Result" not in text:
            return "time"
        return "win" if self.game.passed else "lose" if "hole" in text else "invalid"

    def history(self) -> str:
        """The whole game as the extractor reads it."""
        return prompts.extraction_history(self.turns, self.game.outcome())


def play(
    reader: Reader,
    seats: Sequence[Seat],
    label: str,
    *,
    thinking: bool = True,
    finished: Callable[[int], object] = lambda count: None,
) -> None:
    """Play all games to their end, turn by turn in one batch.

    Args:
      label: separates the random streams of different calls.
      finished: told after each turn how many games have ended with it.
    """
    live = [(i, seat) for i, seat in enumerate(seats) if not seat.game.done]
    for turn in range(environments.MAX_TURNS):
        texts = [prompts.play_prompt(s.game.situation(), s.knowledge) for _, s in live]
        keys = [(label, thinking, i, turn) for i, _ in live]
        for (_, seat), reply in zip(
            live, reader.answer(texts, keys, thinking=thinking), strict=True
        ):
            seat.turns.append((seat.game.observation(), reply.text))
            seat.actions.append(seat.game.step(reply.text))
            seat.tokens.append(reply.tokens)
        before, live = len(live), [(i, s) for i, s in live if not s.game.done]
        finished(before - len(live))
