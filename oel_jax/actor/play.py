"""Playing: many games at once in the slots of a sampler."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import jax
import ml_collections

from oel_jax import environments
from oel_jax.base import preemption
from oel_jax.base.errors import UserError
from oel_jax.chat.render import render
from oel_jax.chat.tokenizer import Tokenizer
from oel_jax.data.messages import NOTHING, Context, Dialogue, user
from oel_jax.data.trajectories import Transcript, Turn
from oel_jax.models.language_model import LanguageModel
from oel_jax.models.lengths import SHARED_FROM, common_prefix
from oel_jax.runs.console import Progress
from oel_jax.runs.keys import chain_key, generation_key
from oel_jax.runs.samplers import build_sampler, play_layout
from oel_jax.sampler.requests import Completion, Request, Sampling
from oel_jax.sampler.sampler import Sampler


@dataclass(frozen=True)
class Job:
    """One game to be played.

    Attributes:
      seed: board.
      key: (purpose, parts...) the randomness of the game depends on.
      context: what the policy reads in addition to the game.
      chain: chain seed index for evaluation and extraction games, None for deploy games.
      tag: for the caller.
      game: name of the game; '' is the config's.
    """

    seed: int
    key: tuple[object, ...]
    context: Context = NOTHING
    chain: int | None = None
    tag: object = None
    game: str = ""


@dataclass
class Played:
    """A finished game.

    Attributes:
      tokens: response tokens per turn, the stop token not counted (spec 9.1).
    """

    job: Job
    game: environments.Game
    transcript: Transcript = field(default_factory=Transcript)
    tokens: list[int] = field(default_factory=list)

    @property
    def turns(self) -> list[Turn]:
        return self.transcript.turns


@dataclass(frozen=True)
class Player:
    """A policy with the sampler that it plays in.

    Attributes:
      beginnings: ids that the prompts with each context begin with, see `shared_beginning`.
      games: how many are played at once.
    """

    config: ml_collections.ConfigDict
    model: LanguageModel
    sampler: Sampler
    beginnings: Mapping[Context, tuple[int, ...]]
    games: int


def make_player(
    config: ml_collections.ConfigDict,
    model: LanguageModel,
    mesh: jax.sharding.Mesh,
    how: Sampling,
    contexts: Iterable[Context],
    requests: int,
) -> Player:
    """A player for games with these contexts, at most `requests` of them at once."""
    contexts = list(dict.fromkeys(contexts))
    beginnings = {each: shared_beginning(config, model.tokenizer, each) for each in contexts}
    shared = {ids for ids in beginnings.values() if ids}
    sizes = play_layout(
        config,
        mesh.shape["fsdp"],
        informed=any(context.text for context in contexts),
        texts=len(shared),
        shared=max(map(len, shared), default=0),
        requests=requests,
    )
    sampler = build_sampler(config, model, mesh, how, sizes)
    return Player(config, model, sampler, beginnings, sizes.slots)


def dialogue_of(config: ml_collections.ConfigDict, situation: str) -> Dialogue:
    """What a policy reads in a situation of a game: every turn begins anew."""
    return Dialogue((user(situation),), config.game.wrapper)


class _ActiveGame:
    """A game in progress: makes the next request, takes the response."""

    def __init__(self, player: Player, job: Job):
        self._player = player
        game = player.config.game
        made = environments.make(job.game or game.name, job.seed, game.layout)
        self.played = Played(job, made)

    def request(self) -> Request:
        """The prompt of the current turn."""
        config, played, job = self._player.config, self.played, self.played.job
        self._dialogue = dialogue_of(config, played.game.situation())
        self._observation = played.game.observation()
        tokenizer, thinking = self._player.model.tokenizer, config.model.thinking
        self._ids = render(tokenizer, self._dialogue, job.context, thinking=thinking)
        parts = (*job.key, job.seed, played.game.turns)
        if job.chain is None:
            key = generation_key(config, *parts)
        else:
            key = chain_key(config, job.chain, *parts)
        limit, beginning = config.sampler.max_response, self._player.beginnings[job.context]
        return Request(self._ids, key, limit, self, prefix=beginning, session=self)

    def respond(self, done: Completion) -> None:
        """Let the model's response act on the game and record the turn."""
        text = self._player.model.tokenizer.decode(done.ids)
        self.played.transcript.add(
            self._dialogue.messages,
            text,
            prompt_ids=self._ids,
            response_ids=done.ids,
            action=self.played.game.step(text),
            observation=self._observation,
        )
        self.played.tokens.append(len(done.ids) - done.stopped)


def shared_beginning(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer, context: Context
) -> tuple[int, ...]:
    """Ids that all prompts of games with one context begin with; () if too few to matter.

    They follow from the text alone, not from the games at hand, so that a resumed run cuts its
    prompts at the same place.
    """
    thinking = config.model.thinking
    first, second = (
        render(tokenizer, dialogue_of(config, situation), context, thinking=thinking)
        for situation in ("a", "1")
    )
    length = common_prefix(first, second)
    return tuple(first[:length]) if length >= SHARED_FROM else ()


def play(player: Player, jobs: Iterable[Job], progress: Progress) -> Iterator[Played]:
    """Play games and yield each as it ends (in no particular order).

    A game whose turn is answered takes its next turn at once; it does not wait for the others.
    """
    sampler, waiting_jobs = player.sampler, iter(jobs)

    def start_games() -> Iterator[Request]:
        for job in waiting_jobs:
            yield _ActiveGame(player, job).request()

    turns = answered = 0
    before, still = sampler.generated, progress.total - progress.done

    def most() -> float:
        """Tokens of all games if none ended early and answers stayed as long as so far."""
        each = answered / turns if turns else player.config.sampler.max_response
        return still * environments.MAX_TURNS * each

    progress.follow(most, turns=lambda: turns, tokens=lambda: sampler.written - before)
    newcomers = start_games()
    sampler.submit(islice(newcomers, player.games))
    with preemption.holding():
        while sampler.busy:
            preemption.stop_if_noticed("finished games are kept")
            for done in sampler.poll(player.model.params):
                active = done.tag
                active.respond(done)
                turns += 1
                answered += len(done.ids)
                if not active.played.game.done:
                    sampler.submit([active.request()])
                    continue
                progress.update()
                yield active.played
                sampler.submit(islice(newcomers, 1))


def in_order(played: Iterable[Played], jobs: Iterable[Job]) -> Iterator[Played]:
    """The same games in the order of `jobs`, so that files do not depend on who finishes first."""
    finished: dict[int, Played] = {}
    order = iter(jobs)
    following = next(order, None)
    for game in played:
        finished[id(game.job)] = game
        while following is not None and id(following) in finished:
            yield finished.pop(id(following))
            following = next(order, None)


def check_first_prompts(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> None:
    """UserError if the game's first prompt is longer than `sampler.max_prompt`, or if the model's
    template cannot show a text where `extract.place` puts it.

    Asked before weights are loaded. What a whole game needs is read off a scripted one.
    """
    game = environments.make(config.game.name, environments.heldout_seeds(1)[0], config.game.layout)
    text = Context("knowledge", "a", config.extract.place)
    dialogue = dialogue_of(config, game.situation())
    try:
        render(tokenizer, dialogue, text, thinking=config.model.thinking)
    except UserError as error:
        raise UserError(f"config.extract.place={text.place!r}: {error}") from error

    def tokens() -> int:
        dialogue = dialogue_of(config, game.situation())
        return len(render(tokenizer, dialogue, thinking=config.model.thinking))

    first, most = tokens(), config.sampler.max_prompt
    if first <= most:
        return
    longest = first
    while not game.done:
        longest = max(longest, tokens())
        game.step(("[right]", "[left]")[game.turns % 2])
    raise UserError(
        f"config.sampler.max_prompt is {most}, but the first prompt of {config.game.name} has "
        f"{first} tokens with this model's tokenizer; a scripted game reaches {longest}: set "
        f"config.sampler.max_prompt to {-(-longest * 5 // 4 // 128) * 128} or more"
    )
