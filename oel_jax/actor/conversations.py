"""A conversation as a policy can learn from it: what it reads, as ids, and what does not fit."""

import datetime
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_collections

from oel_jax.base.errors import UserError
from oel_jax.chat.render import render
from oel_jax.chat.tokenizer import load_tokenizer
from oel_jax.config.budgets import (
    extraction_domain,
    extraction_template,
    extractor_budget,
    has_extractor,
)
from oel_jax.data import prompts
from oel_jax.data.history import history
from oel_jax.data.messages import Context, Dialogue, user
from oel_jax.data.trajectories import DecisionPoint, Trajectory, Transcript, Turn
from oel_jax.models.bundled import resolve_bundled
from oel_jax.models.huggingface import resolve

# Facts of a turn that say nothing about what was said.
_FACTS = ("answer", "feedback", "id", "policy", "time", "sampling", "finish", "approved")


class LeftOut(Exception):
    """A conversation cannot be used; the message is the reason, the same for all of its kind."""


class Preparation:
    """Makes conversations ready for a policy: new turns, unwrapped, with ids, cut to what fits."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        policy: Path,
        today: datetime.datetime,
        round_number: int,
    ):
        """Args:
          policy: directory of P_r, whose tokenizer and template show the messages.

        Raises:
          UserError: the template cannot show a text at `extract.place`.
        """
        self._config, self._round = config, round_number
        self._tokenizer = load_tokenizer(policy, today)
        self._extractor = self._tokenizer
        if has_extractor(config) and config.extract.model_path:
            directory = resolve(resolve_bundled(config.extract.model_path))
            self._extractor = load_tokenizer(directory, today)
        self._wrapper = config.game.wrapper if config.logs.wrapper else ""
        self._knowledge = Context("knowledge", "Be kind.", config.extract.place)
        self._vocabulary = self._tokenizer.vocab_size
        try:
            self._ids(Dialogue((user("Hello"),), self._wrapper), self._knowledge)
        except UserError as error:
            raise UserError(
                f"config.extract.place={config.extract.place!r} does not suit the model: {error}"
            ) from error

    def prepare(self, one: Trajectory, used: int, cut: Counter[str]) -> Trajectory:
        """The turns after the first `used`, each with the ids that the policy reads.

        Args:
          cut: reason -> number of conversations whose end was left out.

        Raises:
          LeftOut: nothing of it can be used.
        """
        transcript, points = Transcript(), list(one.points())
        before, most = "", self._config.sampler.max_prompt
        for number in range(used, len(points)):
            point, turn = points[number], one.turns[number]
            dialogue, situation = self._unwrapped(point)
            ids = self._prompt_ids(point, dialogue)
            if len(ids) > most:
                break
            facts: dict[str, Any] = {
                name: value
                for name in _FACTS
                if (value := getattr(turn, name, None)) not in (None, False)
            }
            if situation is not None:
                said = one.turns[number - 1].feedback if number else None
                news = _news(before, situation, self._config.logs.leave_out or "")
                facts["observation"] = news if said is None else said
                before = situation
            transcript.add(
                dialogue.messages,
                turn.response,
                prompt_ids=ids,
                response_ids=self._response_ids(turn),
                **facts,
            )
        turns = transcript.turns
        if not turns:
            raise LeftOut("its first prompt is too long (config.sampler.max_prompt)")
        if used + len(turns) < len(points):
            cut["the end of a conversation, too long (config.sampler.max_prompt)"] += 1
            # What is cut off still says how the last answer was taken.
            said = one.feedback(used + len(turns) - 1)
            turns[-1] = replace(turns[-1], feedback=said or None)
        return replace(
            one,
            turns=tuple(turns),
            purpose="deploy",
            round=self._round,
            chain=None,
            wrapper=self._wrapper or None,
        )

    def _unwrapped(self, point: DecisionPoint) -> tuple[Dialogue, str | None]:
        """The dialogue as it is stored, and the situation where messages are game prompts."""
        dialogue = point.dialogue
        if not self._wrapper:
            return dialogue, None
        if dialogue.wrapper:
            return dialogue, _last_user(dialogue)[1]
        at, text = _last_user(dialogue)
        situation = prompts.situation_of(text, self._wrapper)
        if situation is None:
            raise LeftOut("a message is not in the paper's wrapper (config.logs.wrapper)")
        messages = list(dialogue.messages)
        messages[at] = {**messages[at], "content": situation}
        return Dialogue(tuple(messages), self._wrapper, dialogue.tools), situation

    def _prompt_ids(self, point: DecisionPoint, dialogue: Dialogue) -> list[int]:
        """What the policy read, or would have read."""
        try:
            ids = self._ids(dialogue)
            self._ids(dialogue, self._knowledge)
        except UserError:
            raise LeftOut("the model's chat template does not show its messages") from None
        recorded = point.prompt_ids
        ours = recorded is not None and max(recorded) < self._vocabulary
        return list(recorded) if ours else ids

    def _ids(self, dialogue: Dialogue, *context: Context) -> list[int]:
        return render(self._tokenizer, dialogue, *context, thinking=self._config.model.thinking)

    def _response_ids(self, turn: Turn) -> list[int]:
        if turn.response_ids is not None and max(turn.response_ids, default=0) < self._vocabulary:
            return list(turn.response_ids)
        return [*self._tokenizer.encode(turn.response), self._tokenizer.stop_ids[0]]

    def hindrance(self, one: Trajectory) -> str | None:
        """Why no knowledge can be drawn from a conversation; None: it can."""
        config = self._config
        if not has_extractor(config):
            return None
        told = history(one, reactions=config.extract.history == "reactions")
        if not told:
            return "of extraction, nothing was said about its answers (config.extract.history)"
        message = prompts.extraction_prompt(
            told,
            "",
            version=config.extract.version,
            template=extraction_template(config),
            domain=extraction_domain(config),
        )
        length = len(self._extractor.chat(message, thinking=config.model.thinking))
        length += config.extract.l_max if config.extract.previous else 0
        fits = length <= extractor_budget(config)[0]
        return None if fits else "of extraction, too long (config.extract.max_prompt)"


def _last_user(dialogue: Dialogue) -> tuple[int, str]:
    """(place, text) of the last user message.

    Raises:
      LeftOut: there is none.
    """
    for at in reversed(range(len(dialogue.messages))):
        if dialogue.messages[at]["role"] == "user":
            return at, dialogue.messages[at]["content"]
    raise LeftOut("no message of a user comes before an answer")


def _news(before: str, situation: str, known: str) -> str:
    """What a situation says in addition to the one before; of the first one, without `known`."""
    old = before.rstrip("\n")
    if old and situation.startswith(old):
        return situation[len(old) :].rstrip("\n")
    return (situation.replace(known, "", 1) if known else situation).rstrip("\n")


# --- which conversations --------------------------------------------------------------------------


def by_name(pieces: Iterable[Trajectory]) -> Iterator[Trajectory]:
    """Conversations whose every prompt begins anew, put together by the name a client gave them.

    Nothing in their messages says that they belong together. Pieces are in the order in which they
    were recorded, and so are the turns.
    """
    named: dict[tuple[str | None, str], list[Trajectory]] = {}
    for one in pieces:
        if one.conversation is None:
            yield one
        else:
            named.setdefault((one.user, one.conversation), []).append(one)
    for (_, name), parts in named.items():
        first = parts[0]
        turns = [
            turn
            if part.policy == first.policy
            else replace(turn, policy=turn.policy or part.policy)
            for part in parts
            for turn in part.turns
        ]
        yield replace(first, id=name, turns=tuple(turns))


def policies_of(one: Trajectory) -> set[str]:
    """Who answered in a conversation."""
    return {turn.policy or one.policy for turn in one.turns}


def seconds_since(one: Trajectory) -> float:
    """Seconds since the last answer; infinite if nobody wrote down when it was."""
    times = [turn.time for turn in one.turns if turn.time]
    if not times:
        return math.inf
    last = max(map(datetime.datetime.fromisoformat, times))
    return (datetime.datetime.now(datetime.UTC) - last).total_seconds()
