"""Records exchanges before their clients see the end of the answer."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.data.conversations import ConversationStore, now
from oel_jax.data.messages import Dialogue, Message, answer_message
from oel_jax.data.trajectories import Trajectory, Turn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A request and its answer.

    Attributes:
      id: of the completion.
      policy: who answered.
      dialogue: what was asked, as it was rendered.
      prompt_ids: what the model read.
      response_ids: what it wrote, the stop token included.
      response: the same as text, thought included.
      shown: the answer as later requests show it.
      finish: 'stop', 'length', 'tool_calls' or 'cancelled'.
      sampling: how it was drawn.
      user: opaque id, if the client gives one.
      conversation: the same of the conversation.
    """

    id: str
    policy: str
    dialogue: Dialogue
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    response: str
    shown: Message
    finish: str
    sampling: Mapping[str, Any]
    user: str | None = None
    conversation: str | None = None

    def trajectory(self) -> Trajectory:
        """It as a conversation of one turn, with all messages and ids."""
        plain = self.shown == answer_message(self.response)
        turn = Turn(
            messages=self.dialogue.messages,
            response=self.response,
            prompt_ids=self.prompt_ids,
            response_ids=self.response_ids,
            answer=None if plain else self.shown,
            time=now(),
            sampling=self.sampling,
            finish=self.finish,
        )
        return Trajectory(
            policy=self.policy,
            purpose="deploy",
            turns=(turn,),
            id=self.id,
            tools=self.dialogue.tools,
            conversation=self.conversation,
            user=self.user,
        )


class RecordingFailed(Exception):
    """An exchange or feedback could not be recorded."""


class Recorder:
    """Writes exchanges and feedback to a store, one after the other, in a thread of its own.

    Args:
      store: None: nothing is recorded.
      required: an exchange that cannot be recorded is not answered.
      on_write: told of each try, whether it succeeded.

    Attributes:
      failing: the last write failed.
    """

    def __init__(
        self,
        store: ConversationStore | None,
        *,
        required: bool = False,
        on_write: Callable[[bool], None] = lambda written: None,
    ):
        self.store, self.required, self.failing = store, required, False
        self._on_write = on_write
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recorder")

    async def record(self, exchanges: Sequence[Exchange]) -> None:
        """Write exchanges; when this returns they are on disk, unless recording is failing.

        Raises:
          RecordingFailed: the disk refuses, and recording is required.
        """
        if self.store is None:
            return
        writing = [self._thread.submit(self._write_exchange, one) for one in exchanges]
        written = [await asyncio.wrap_future(one) for one in writing]
        if self.required and not all(written):
            raise RecordingFailed

    def record_later(self, exchange: Exchange) -> None:
        """Write the exchange of a client that is gone; nobody waits for it."""
        if self.store is not None:
            self._thread.submit(self._write_exchange, exchange)

    async def feedback(self, completion: str, text: str, user: str | None) -> None:
        """Write feedback; when this returns it is on disk.

        Raises:
          RecordingFailed: the disk refuses.
        """
        assert self.store is not None
        writing: Future[bool] = self._thread.submit(
            self._try, self.store.append_feedback, completion, text, user=user
        )
        if not await asyncio.wrap_future(writing):
            raise RecordingFailed

    def close(self) -> None:
        """Write what waits, and close the store."""
        self._thread.shutdown(wait=True)
        if self.store is not None:
            self._try(self.store.close)

    # --- in the recorder's thread

    def _write_exchange(self, exchange: Exchange) -> bool:
        return self._try(lambda: self.store.append_exchange(exchange.trajectory()))

    def _try(self, write: Callable[..., Any], *what: Any, **more: Any) -> bool:
        """Whether it succeeded; a failure is logged when it begins, not with every answer."""
        try:
            write(*what, **more)
        except UserError as error:
            if not self.failing:
                given = "refused until it works again" if self.required else "given all the same"
                logger.error("recording fails; answers are %s: %s", given, error)
            self.failing = True
        except Exception:  # a mistake of this program must not take the answer with it
            logger.exception("an exchange could not be recorded")
            self._on_write(False)
            return False
        else:
            if self.failing:
                logger.warning("recording works again")
            self.failing = False
        self._on_write(not self.failing)
        return not self.failing
