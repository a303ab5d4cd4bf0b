"""Answers to one request: drawn by an engine, turned into text, cut, and taken apart."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from oel_jax.data.messages import Dialogue, Message
from oel_jax.models.language_model import LanguageModel
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.serve.conversations import answer_of_calls
from oel_jax.serve.streaming import StopTexts, TextStream, ThoughtStream
from oel_jax.serve.token_scores import TokenScore, token_scores
from oel_jax.serve.tool_calls import ToolCallStream


class AnswerTimedOut(Exception):
    """An answer took longer than a client may wait."""


class EngineFailed(Exception):
    """The engine could not finish an answer."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One answer that is asked for.

    Attributes:
      id: of the answer in the store.
      model: whose chat template the prompt is in.
      dialogue: the messages; None where the prompt is a plain text.
      prompt: ids.
      sampling, seed, max_new: how it is drawn.
      stops: texts before which it is cut.
      opened: the prompt ends inside a thought.
      top: alternatives of each token that are to be scored; None: no scores.
    """

    id: str
    model: LanguageModel
    dialogue: Dialogue | None
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    number: int
    max_new: int
    stops: tuple[str, ...] = ()
    opened: bool = False
    top: int | None = None

    def request(self) -> Request:
        """What the engine is asked; equal seeds draw equal answers."""
        key = request_key(self.seed, "serve", self.number)
        return Request(self.prompt, key, self.max_new, sampling=self.sampling)

    @property
    def recorded_sampling(self) -> dict[str, Any]:
        """The settings as they are recorded."""
        how = self.sampling
        made = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k}
        made |= {"seed": self.seed, "max_tokens": self.max_new}
        return made | ({"stop": list(self.stops)} if self.stops else {})


@dataclass(frozen=True)
class Delta:
    """What is new of an answer.

    Attributes:
      said: text; thought: of its thought; calls: of tools, in the API's form.
      scores: of the tokens that came, whether or not their text is held back.
    """

    said: str = ""
    thought: str = ""
    calls: Sequence[dict[str, Any]] = ()
    scores: Sequence[TokenScore] = ()

    def __bool__(self) -> bool:
        return bool(self.said or self.thought or self.calls or self.scores)


@dataclass
class Answering:
    """An answer while it is written; `deltas` gives what is new, the fields what there is so far.

    Attributes:
      ids: sampled so far; those after a stop text are left out.
      finish: 'stop', 'length' or 'tool_calls'; None until it is finished.
    """

    wanted: Wanted
    answer: Any
    ids: list[int] = field(default_factory=list)
    said: str = ""
    thought: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish: str | None = None

    def __post_init__(self) -> None:
        wanted = self.wanted
        self._text = TextStream(wanted.model.tokenizer.decode)
        self._stops = StopTexts(wanted.stops)
        chat = wanted.dialogue is not None
        self._thoughts = ThoughtStream(opened=wanted.opened) if chat else None
        self._tools = ToolCallStream(active=chat and bool(wanted.dialogue.tools))

    @property
    def policy(self) -> str:
        """Who answers."""
        return self.answer.policy

    @property
    def response(self) -> str:
        """All that was sampled, as text."""
        return self.wanted.model.tokenizer.decode(self.ids)

    @property
    def shown(self) -> Message:
        """The answer as later requests show it."""
        return answer_of_calls(self.said, self.calls)

    def cancel(self) -> None:
        """Tell the engine that nobody waits any more."""
        self.answer.cancel()

    async def deltas(self, deadline: float) -> AsyncIterator[Delta]:
        """What is new, until the answer is finished.

        Args:
          deadline: in the time of the event loop.

        Raises:
          AnswerTimedOut, EngineFailed.
        """
        pieces = aiter(self.answer)
        try:
            while not self._stops.found:
                try:
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    break
                except TimeoutError as error:
                    raise AnswerTimedOut from error
                yield await self._take(piece.ids)
            if not self._stops.found:
                if self.answer.finish not in ("stop", "length"):
                    raise EngineFailed(self.answer.finish)
                yield self._grow((), last=True)
            self.finish = "stop" if self._stops.found else self.answer.finish
            if self.calls and self.finish == "stop":
                self.finish = "tool_calls"
        finally:
            if self.finish is None or self._stops.found:
                self.cancel()

    async def _take(self, ids: Sequence[int]) -> Delta:
        """What some more ids say, with their scores if these are wanted."""
        before = len(self.ids)
        # Id by id where a stop text may come, so that what was sampled after it is not kept.
        parts = [(one,) for one in ids] if self.wanted.stops else [tuple(ids)]
        made = Delta()
        for part in parts:
            one = self._grow(part)
            made = Delta(
                made.said + one.said, made.thought + one.thought, (*made.calls, *one.calls)
            )
            if self._stops.found:
                break
        if self.wanted.top is None:
            return made
        context = (*self.wanted.prompt, *self.ids[:before])
        scored = await asyncio.to_thread(
            token_scores, self.wanted.model, context, self.ids[before:], self.wanted.top
        )
        self.scores += scored
        return Delta(made.said, made.thought, made.calls, scored)

    def _grow(self, ids: Sequence[int], *, last: bool = False) -> Delta:
        self.ids += ids
        text, thought = self._text.add(ids, last=last), ""
        if self._thoughts is not None:
            thought, text = self._thoughts.add(text, last=last)
        text = self._stops.add(text, last=last)
        said, calls = self._tools.add(text, last=last or self._stops.found)
        self.said, self.thought = self.said + said, self.thought + thought
        self.calls += calls
        return Delta(said, thought, calls)
