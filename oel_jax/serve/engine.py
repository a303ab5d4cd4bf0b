"""Answers of one policy to many clients at once: a thread that owns a sampler. No web code.

    engine = Engine(model, "round_000", SamplerConfig(slots=16, length=2048, response=512))
    answer = engine.submit(Request(prompt_ids, request_key("a seed"), max_new=64))
    async for piece in answer: ...
    engine.close()

`submit` and `cancel` may be called from any thread and never wait for the device. The thread hands
new requests to the sampler, lets it decode a few tokens for all, and passes on what each got.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from oel_jax.models.language_model import LanguageModel
from oel_jax.models.lengths import padded_length
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Completion, Request, Sampling, request_key
from oel_jax.sampler.sampler import Sampler
from oel_jax.serve.answer import Answer, Piece, wake

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds for the end of the last dispatch, when the engine is closed
FAILURES, FAILURE_SECONDS = 3, 60.0  # so many failures in this time: the engine is given up


class Full(Exception):
    """More requests wait than the engine lets wait.

    Attributes:
      retry_after: seconds after which a place is likely to be free, measured, at least 1.
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests wait already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Unavailable(Exception):
    """The engine takes no more requests: it is being stopped, or it has failed too often."""


@dataclass
class Counts:
    """What an engine has done since it was made.

    Attributes:
      submitted, refused: requests taken, and those that found it full or closed.
      stop, length, cancelled, error: answers by how they ended.
      prompt_tokens, encoded: of the prompts of started answers; and those of them that went
        through the model, the others being reused.
      tokens: generated, those of unfinished answers included.
      failures: of the engine itself.
    """

    submitted: int = 0
    refused: int = 0
    stop: int = 0
    length: int = 0
    cancelled: int = 0
    error: int = 0
    prompt_tokens: int = 0
    encoded: int = 0
    tokens: int = 0
    failures: int = 0


class Engine:
    """Serves one policy.

    Attributes:
      policy_name: named by every answer.
      sizes: of its sampler; `follow`, `reuse` and `any_settings` are always on.
      waiting: requests that may wait for a slot; more are refused.
      ended: called by the thread with every answer that has ended; it must be quick.
      shadow: called with every request that is taken; it must be quick.
    """

    def __init__(
        self,
        model: LanguageModel,
        policy_name: str,
        sizes: SamplerConfig,
        *,
        sampling: Sampling | None = None,
        waiting: int = 64,
    ):
        """Allocate the sampler and start the thread.

        Args:
          sampling: of requests that bring no settings.

        Raises:
          ValueError: the sizes do not fit the model's mesh.
        """
        self.model, self.policy_name = model, policy_name
        self.sizes = replace(sizes, follow=True, reuse=True, any_settings=True)
        self.waiting = waiting
        self.ended: Callable[[Answer], None] | None = None
        self.shadow: Callable[[Request], None] | None = None
        self._default = sampling
        self._sampler = self._new_sampler()
        self._changed = threading.Condition()
        # All below is read and written with `_changed` held, but `_counts` of the thread.
        self._inbox: list[Answer] = []
        self._unwanted: dict[Answer, str] = {}
        self._live: dict[int, Answer] = {}
        self._closing = self._failed = False
        self._number = 0
        self._counts = Counts()
        self._done_before = (0, 0)  # (encoded, written) of samplers that were given up
        self._ends: deque[float] = deque(maxlen=64)
        self._failure_times: deque[float] = deque(maxlen=FAILURES)
        self._thread = threading.Thread(
            target=self._work, name=f"engine {policy_name}", daemon=True
        )
        self._thread.start()

    # --- what clients call

    def submit(self, request: Request, *, seconds: float | None = None) -> Answer:
        """Queue a request.

        Args:
          request: its tag is not used. A session is not needed for reuse.
          seconds: the answer is cancelled when so many have passed.

        Raises:
          Full: too many wait already.
          Unavailable: the engine is being closed, or has failed.
          RequestError: the request does not fit the sampler.
        """
        return self.submit_all([request], seconds=seconds)[0]

    def submit_all(
        self, requests: Sequence[Request], *, seconds: float | None = None
    ) -> list[Answer]:
        """Queue all of some requests or, where that raises, none; see `submit`."""
        with self._changed:
            if self._closing or self._failed:
                self._counts.refused += len(requests)
                raise Unavailable(self._why_unavailable())
            for request in requests:
                self._sampler.check(request)
            waiting = max(0, len(self._live) - self.sizes.slots)
            if len(self._live) + len(requests) > self.sizes.slots + self.waiting:
                self._counts.refused += len(requests)
                raise Full(waiting, self._retry_after(waiting))
            deadline = None if seconds is None else monotonic() + seconds
            answers = []
            for request in requests:
                self._number += 1
                mine = replace(request, tag=self._number)
                answers.append(Answer(self, mine, self._number, deadline))
                self._live[self._number] = answers[-1]
            self._counts.submitted += len(requests)
            self._inbox += answers
            self._changed.notify()
        if (shadow := self.shadow) is not None:
            for request in requests:
                shadow(request)
        return answers

    def warm_up(self) -> str:
        """Answer prompts of every size into which they are cut, so that all is compiled.

        Returns: why it cannot answer; '' if it can.
        """
        chunk, room = self.sizes.prefill_chunk, self.sizes.length - 2
        ends = {}  # the longest piece of each padded size
        for count in range(min(chunk, room - 1) + 1):
            ends[padded_length(count)] = count
        answers = []
        for number, count in enumerate(ends.values()):
            prompt = [number % self.model.vocab_limit] * (count + 1)
            request = Request(prompt, request_key("warm-up"), 1, stop_ids=())
            answers.append(self.submit(request))
            answers[-1].wait()
        bad = [answer for answer in answers if answer.finish != "length"]
        return (bad[0].reason or str(bad[0].finish)) if bad else ""

    def cancel(self, answers: Iterable[Answer], reason: str = "cancelled") -> None:
        """Give up answers; those that have finished stay as they are. Never blocks."""
        with self._changed:
            self._unwanted |= {one: reason for one in answers if one.finish is None}
            self._changed.notify()

    def close(self, seconds: float = 30.0) -> bool:
        """Refuse new requests, finish those taken, and end the thread.

        Args:
          seconds: for the answers that are taken; what is not finished then is cancelled.

        Returns: whether all answers could be finished.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(max(0.0, seconds))
        whole = not self._thread.is_alive()
        if not whole:
            with self._changed:
                left = list(self._live.values())
            self.cancel(left, "the server stopped")
            self._thread.join(PATIENCE)  # a dispatch under way may be compiling
        return whole

    def drain(self) -> None:
        """Refuse new requests and let the thread end when those taken are finished."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    @property
    def open(self) -> bool:
        """Whether it takes requests."""
        return not self._closing and not self._failed

    @property
    def drained(self) -> bool:
        """Whether the thread has ended: the sampler and the weights are let go."""
        return not self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        """Whether it answers requests."""
        return not self._failed and self._thread.is_alive()

    @property
    def live(self) -> int:
        """Answers that are not finished."""
        return len(self._live)

    def counts(self) -> Counts:
        """A copy of the counts."""
        with self._changed:
            return replace(self._counts)

    # --- the thread

    def _work(self) -> None:
        while self._wait_for_work():
            try:
                self._step()
            except Exception:
                self._start_again()
        self._sampler = self.model = None  # their memory is for the next policy

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; whether there will be anything."""
        with self._changed:
            while not (self._inbox or self._unwanted or self._live):
                if self._closing or self._failed:
                    return False
                self._changed.wait()
            return True

    def _step(self) -> None:
        """Take in what clients want, decode once, pass on what came."""
        waiters = []
        with self._changed:
            new, self._inbox = self._inbox, []
            unwanted, self._unwanted = self._unwanted, {}
            now = monotonic()
            for answer in self._live.values():
                if answer.deadline is not None and answer.deadline <= now:
                    unwanted.setdefault(answer, "deadline")
        self._sampler.submit(answer.request for answer in new)
        self._sampler.cancel([answer.request for answer in unwanted])
        for answer, reason in unwanted.items():
            waiters += self._finish(answer, "cancelled", reason)
        wake(waiters)
        done = self._sampler.poll(self.model.params)
        wake(self._pass_on(done))

    def _pass_on(self, done: Sequence[Completion]) -> list:
        """Pieces and ends of one dispatch; returns who waits for them."""
        waiters = []
        for one in self._sampler.progress:
            answer = self._live[one.tag]
            if not answer.pieces:
                self._counts.prompt_tokens += answer.prompt_tokens
            waiters += answer.add(Piece(one.ids, one.log_probs))
        for one in done:
            waiters += self._finish(self._live[one.tag], "stop" if one.stopped else "length")
        encoded, written = self._done_before
        self._counts.encoded = encoded + self._sampler.encoded
        self._counts.tokens = written + self._sampler.written
        return waiters

    def _finish(self, answer: Answer, finish: str, reason: str = "") -> list:
        with self._changed:
            if self._live.pop(answer.number, None) is None:
                return []
            setattr(self._counts, finish, getattr(self._counts, finish) + 1)
            self._ends.append(monotonic())
        waiters = answer.end(finish, reason)
        if self.ended is not None:
            self.ended(answer)
        return waiters

    def _start_again(self) -> None:
        """After a failure: running answers end, and the sampler is made anew."""
        logger.exception("the engine of %s failed; its running answers end", self.policy_name)
        now = monotonic()
        self._counts.failures += 1
        self._failure_times.append(now)
        often = len(self._failure_times) == FAILURES
        often = often and now - self._failure_times[0] < FAILURE_SECONDS
        self._done_before = (self._counts.encoded, self._counts.tokens)
        self._sampler.drop()
        try:
            if not often:
                self._sampler = self._new_sampler()
        except Exception:
            logger.exception("the engine of %s cannot start again", self.policy_name)
            often = True
        with self._changed:
            self._failed = often
            self._inbox, self._unwanted, lost = [], {}, list(self._live.values())
        waiters = []
        for answer in lost:
            waiters += self._finish(answer, "error", "the engine failed while it answered")
        wake(waiters)

    def _new_sampler(self) -> Sampler:
        return Sampler(
            self.model.cfg,
            self.model.mesh,
            self.sizes,
            limit=self.model.vocab_limit,
            stop_ids=self.model.tokenizer.stop_ids,
            sampling=self._default,
        )

    # --- messages

    def _why_unavailable(self) -> str:
        if self._failed:
            return "the engine has failed too often; see the server's log"
        return "the server is stopping"

    def _retry_after(self, waiting: int) -> float:
        """Seconds until those who wait now have slots, as fast as answers ended lately."""
        if len(self._ends) < 2:
            return 1.0
        each = (monotonic() - self._ends[0]) / (len(self._ends) - 1)
        return min(60.0, max(1.0, each * waiting))


def serving_sizes(*, slots: int, length: int, response: int, **more: Any) -> SamplerConfig:
    """Sizes that suit clients who read along: short dispatches, chunks that many prompts share.

    Args:
      slots, length, response: see `SamplerConfig`.
      more: its other fields.
    """
    sizes = {"prefill_rows": min(8, slots), "prefill_chunk": 64, "decode_steps": 8, "seconds": 0.3}
    return SamplerConfig(slots=slots, length=length, response=response, **sizes | more)


def samples(request: Request, count: int) -> list[Request]:
    """`count` requests for one prompt, each with its own random key; the first is `request`."""
    key = request.key.tobytes().hex()
    more = [replace(request, key=request_key("sample", key, i)) for i in range(1, count)]
    return [request, *more]
