"""What the routes do, without HTTP: check, admit, answer, record."""

import asyncio
import logging
import math
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from oel_jax.models.language_model import LanguageModel
from oel_jax.sampler.requests import RequestError, Sampling
from oel_jax.serve.api_errors import ApiError, bad_request, not_supported, try_later
from oel_jax.serve.completion_ids import CompletionIds
from oel_jax.serve.completions import Answering, AnswerTimedOut, Delta, EngineFailed, Wanted
from oel_jax.serve.conversations import dialogue_of, prompt_of
from oel_jax.serve.engine import Engine, Full, Unavailable
from oel_jax.serve.measures import Measures
from oel_jax.serve.policies import Policies
from oel_jax.serve.recorder import Exchange, Recorder, RecordingFailed
from oel_jax.serve.requests import ChatRequest, Sampled, TextRequest, refused

logger = logging.getLogger(__name__)

_REMEMBERED = 20_000  # completions whose policy is known
CURRENT = "policy"  # the model's name that always means the newest policy


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server bears.

    Attributes:
      seconds: from a request to the end of its answer.
      body: bytes of a request.
      connections: open at once.
    """

    seconds: float = 600.0
    body: int = 4 * 2**20
    connections: int = 1000


@dataclass
class Job:
    """The answers to one request.

    Attributes:
      id: of the completion; user, conversation, stored: what the client said of it.
      prompts: tokens of all prompts.
      shown: something of them has been given to the client.
      settling: they are finished and being recorded; settled: that is done.
    """

    id: str
    answers: list[Answering]
    prompts: int
    user: str | None = None
    conversation: str | None = None
    stored: bool = True
    began: float = 0.0
    shown: bool = False
    settling: bool = False
    settled: bool = False

    @property
    def policy(self) -> str:
        return self.answers[0].policy


@dataclass
class Service:
    """The state of one server.

    Args:
      policies: who answers.
      recorder: where exchanges go.
      ids: of completions.
      thinking: the template's flag, where a request does not say.
    """

    policies: Policies
    recorder: Recorder
    ids: CompletionIds
    limits: Limits = field(default_factory=Limits)
    measures: Measures = field(default_factory=Measures)
    thinking: bool = False
    stopping: bool = False

    def __post_init__(self) -> None:
        self.jobs: list[Job] = []
        self._rendering = 0  # answers whose prompts are being made
        self._answered: OrderedDict[str, str] = OrderedDict()  # completion -> policy, the last ones
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="renderer")
        follow = self.measures.follow
        follow("oel_answers_in_progress", "Answers waiting or running", self._in_progress)
        self.measures.follow_policies(self.policies.report)
        follow("oel_recording_failing", "1: the last write failed", lambda: self.recorder.failing)

    def _in_progress(self) -> int:
        return sum(len(job.answers) for job in self.jobs)

    def close(self) -> None:
        """End the engines, and finish what is to be recorded."""
        self.policies.close()
        self._renderer.shutdown(wait=True)
        self.recorder.close()

    # --- from a request to a job

    async def chat(self, body: ChatRequest, conversation: str | None) -> Job:
        """Begin to answer a conversation.

        Raises:
          ApiError: it cannot be answered, or not now.
        """
        self._check(body)
        if body.top_logprobs and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        told = (body.metadata or {}).get("conversation") or conversation
        engine = self._engine(body.model, told or body.user)
        number = self._count(body, engine)
        options = body.chat_template_kwargs
        thinking = self.thinking if options is None else options.enable_thinking
        thinking = self.thinking if thinking is None else thinking
        most, name = body.max_completion_tokens, "max_completion_tokens"
        if most is None:
            most, name = body.max_tokens, "max_tokens"

        def make() -> list[Wanted]:
            dialogue = dialogue_of(body)
            prompt = tuple(prompt_of(engine.model, dialogue, thinking=thinking))
            return self._wanted(
                body,
                engine,
                "chatcmpl",
                [prompt],
                number,
                most,
                name,
                dialogue=dialogue,
                opened=engine.model.tokenizer.opens_thought(thinking=thinking),
                top=(body.top_logprobs or 0) if body.logprobs else None,
            )

        job = await self._begin(engine, make, number)
        job.user, job.conversation, job.stored = body.user, told, body.wants_stored
        return job

    async def text(self, body: TextRequest) -> Job:
        """Begin to continue plain texts.

        Raises:
          ApiError: see `chat`.
        """
        self._check(body)
        engine = self._engine(body.model, body.user)
        prompts = _prompts(body, engine.model)
        number = self._count(body, engine)
        if number * len(prompts) > engine.sizes.slots:
            raise bad_request(
                f"{len(prompts)} prompts with n={number} are more answers than this server gives "
                f"at once ({engine.sizes.slots})",
                "prompt",
            )

        def make() -> list[Wanted]:
            ids = [tuple(_ids(one, engine.model)) for one in prompts]
            return self._wanted(
                body, engine, "cmpl", ids, number, body.max_tokens, "max_tokens", top=body.logprobs
            )

        return await self._begin(engine, make, number * len(prompts))

    def _check(self, body: Sampled) -> None:
        if self.stopping:
            raise try_later("The server is stopping", 5, status=503, code="server_stopping")
        what = refused(body)
        if what is not None:
            raise not_supported(*what)
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")

    def _engine(self, name: str, key: str | None) -> Engine:
        engine = self.policies.engine(None if name == CURRENT else name, key=key)
        if engine is None:
            raise ApiError(
                404,
                f"The model {name[:100]!r} does not exist; GET /v1/models lists those that do",
                param="model",
                code="model_not_found",
            )
        return engine

    def _count(self, body: Sampled, engine: Engine) -> int:
        number = body.n or 1
        if number > engine.sizes.slots:
            raise bad_request(
                f"n is {number}; this server gives at most {engine.sizes.slots} answers at once",
                "n",
                "invalid_value",
            )
        return number

    def _wanted(
        self,
        body: Sampled,
        engine: Engine,
        prefix: str,
        prompts: Sequence[tuple[int, ...]],
        number: int,
        most: int | None,
        most_name: str,
        **more: Any,
    ) -> list[Wanted]:
        """All answers that a request asks for; prompts are taken in order, n answers each."""
        sizes, completion = engine.sizes, self.ids.make(prefix)
        if most is not None and most > sizes.response:
            raise bad_request(
                f"{most_name} is {_short(most)}; this server writes at most {sizes.response} "
                "tokens in an answer",
                most_name,
                "invalid_value",
            )
        seed = secrets.randbits(63) if body.seed is None else body.seed
        temperature = 1.0 if body.temperature is None else float(body.temperature)
        top_p = 1.0 if body.top_p is None else float(body.top_p)
        wanted = []
        for prompt in prompts:
            room = sizes.length - len(prompt)
            if room < (most or 1):
                raise bad_request(
                    f"This server's maximum context length is {sizes.length} tokens. The request "
                    f"asks for {len(prompt) + (most or 1)} tokens ({len(prompt)} of the prompt, "
                    f"{most or 1} of the answer). Shorten the prompt or the answer",
                    "messages" if "dialogue" in more else "prompt",
                    "context_length_exceeded",
                )
            for _ in range(number):
                at = len(wanted)
                wanted.append(
                    Wanted(
                        id=f"{completion}-{at}" if at else completion,
                        model=engine.model,
                        prompt=prompt,
                        sampling=Sampling(temperature, body.top_k or 0, top_p),
                        seed=seed,
                        number=at,
                        max_new=min(sizes.response, room) if most is None else most,
                        stops=body.stops,
                        **({"dialogue": None} | more),
                    )
                )
        return wanted

    async def _begin(self, engine: Engine, make: Callable[[], list[Wanted]], number: int) -> Job:
        """Render the prompts, and give them to the engine."""
        began = asyncio.get_running_loop().time()
        if engine.live + self._rendering + number > engine.sizes.slots + engine.waiting:
            raise _full(1)  # before the work of rendering; the engine has the last word
        self._rendering += number
        try:
            loop = asyncio.get_running_loop()
            wanted = await loop.run_in_executor(self._renderer, make)
            answers = engine.submit_all([one.request() for one in wanted])
        except Full as error:
            raise _full(error.retry_after) from error
        except Unavailable as error:
            raise try_later(f"Not now: {error}", 5, status=503, code="unavailable") from error
        except RequestError as error:
            raise bad_request(str(error), None) from error
        finally:
            self._rendering -= number
        prompts = sum(len(prompt) for prompt in dict.fromkeys(one.prompt for one in wanted))
        self.measures.prompt_tokens.inc(prompts)
        pairs = zip(wanted, answers, strict=True)
        job = Job(wanted[0].id, [Answering(*pair) for pair in pairs], prompts, began=began)
        self.jobs.append(job)
        return job

    # --- from a job to its answer

    async def deltas(self, job: Job) -> AsyncIterator[tuple[int, Delta]]:
        """(number of the answer, what is new of it) until all are finished.

        Raises:
          ApiError: an answer took too long, or the engine failed.
        """
        deadline = job.began + self.limits.seconds
        queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

        async def pump(index: int, one: Answering) -> None:
            try:
                async for delta in one.deltas(deadline):
                    queue.put_nowait((index, delta))
                queue.put_nowait((index, None))
            except Exception as error:
                queue.put_nowait((index, error))

        pumps = [asyncio.ensure_future(pump(*item)) for item in enumerate(job.answers)]
        left, first = len(pumps), True
        try:
            while left:
                index, delta = await queue.get()
                if isinstance(delta, BaseException):
                    raise self._error(delta) from delta
                if delta is None:
                    left -= 1
                    continue
                if first and job.answers[index].ids:
                    self._observe(self.measures.first_seconds, job)
                    first = False
                if delta:
                    yield index, delta
        finally:
            for one in pumps:
                one.cancel()

    def _error(self, error: BaseException) -> ApiError:
        if isinstance(error, AnswerTimedOut):
            return ApiError(
                504, f"The answer took longer than {self.limits.seconds:g} s", code="timeout"
            )
        if isinstance(error, EngineFailed):
            if self.stopping:
                return try_later("The server is stopping", 5, status=503, code="server_stopping")
            logger.error("the engine could not finish an answer: %s", error)
        else:
            logger.error("an answer failed", exc_info=error)
        return ApiError(500, "The server failed to finish this answer", code="internal_error")

    async def settle(self, job: Job) -> None:
        """Record finished answers; their clients may see the end of them after this.

        Raises:
          ApiError: they could not be recorded, and recording is required.
        """
        job.settling = True
        exchanges = self._exchanges(job)
        try:
            await self.recorder.record(exchanges)
        except RecordingFailed as error:
            raise try_later(
                "This exchange could not be recorded, and this server answers only what it records",
                30,
                status=503,
                code="recording_failed",
            ) from error
        job.settled = True
        for one in job.answers:
            self._answered[one.wanted.id] = one.policy
        while len(self._answered) > _REMEMBERED:
            self._answered.popitem(last=False)

    def release(self, job: Job) -> None:
        """Give the place of a job back; what is not finished is cancelled.

        What a client has seen of an answer that it did not wait for is recorded as cancelled.
        """
        if job not in self.jobs:
            return
        self.jobs.remove(job)
        for one in job.answers:
            if one.finish is None:
                one.cancel()
            finish = one.finish if job.settled else "cancelled"
            self.measures.finishes.labels(one.policy, finish).inc()
            self.measures.generated_tokens.labels(one.policy).inc(len(one.ids))
        if not job.settling and job.shown:
            job.answers = [one for one in job.answers if one.said or one.thought or one.calls]
            for exchange in self._exchanges(job, "cancelled"):
                self.recorder.record_later(exchange)
        if job.settled:
            self._observe(self.measures.seconds, job)

    def _observe(self, histogram: Any, job: Job) -> None:
        histogram.observe(asyncio.get_running_loop().time() - job.began)

    def _exchanges(self, job: Job, finish: str | None = None) -> list[Exchange]:
        """What is recorded of a job: conversations, not plain texts."""
        if not job.stored:
            return []
        return [
            Exchange(
                id=one.wanted.id,
                policy=one.policy,
                dialogue=one.wanted.dialogue,
                prompt_ids=one.wanted.prompt,
                response_ids=tuple(one.ids),
                response=one.response,
                shown=one.shown,
                finish=finish or one.finish,
                sampling=one.wanted.recorded_sampling,
                user=job.user,
                conversation=job.conversation,
            )
            for one in job.answers
            if one.wanted.dialogue is not None
        ]

    # --- the other routes

    async def feedback(self, completion: str, text: str, user: str | None) -> None:
        """Record what a user says of an answer.

        Raises:
          ApiError: the answer is not known, or nothing is recorded.
        """
        if self.recorder.store is None:
            raise ApiError(
                409, "This server records nothing, so it takes no feedback", code="not_recording"
            )
        if not completion.startswith("chatcmpl-") or not self.ids.knows(completion):
            raise ApiError(
                404,
                "There is no completion with this id",
                param="id",
                code="completion_not_found",
            )
        if not text.strip():
            raise bad_request("text must say something", "text", "invalid_value")
        try:
            await self.recorder.feedback(completion, text, user)
        except RecordingFailed as error:
            raise try_later(
                "The feedback could not be recorded", 30, status=503, code="recording_failed"
            ) from error
        if completion in self._answered:
            self.policies.note_feedback(self._answered[completion])


def _full(seconds: float) -> ApiError:
    return try_later(
        "Too many requests are waiting; try again later",
        math.ceil(seconds),
        code="rate_limit_exceeded",
    )


def _short(number: int) -> str:
    return str(number) if number < 10**12 else "a number of more than 12 digits"


def _prompts(body: TextRequest, model: LanguageModel) -> list[str | list[int]]:
    """One or several prompts as a list.

    Raises:
      ApiError: there is none, or an id that the model does not have.
    """
    prompt = body.prompt
    single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    prompts = [prompt] if single else list(prompt)
    if not prompts or not all(prompts):
        raise bad_request("prompt must not be empty", "prompt", "invalid_value")
    for one in prompts:
        if not isinstance(one, str) and not all(0 <= i < model.vocab_limit for i in one):
            raise bad_request(
                f"prompt holds a token id outside 0 to {model.vocab_limit - 1}", "prompt"
            )
    return prompts


def _ids(prompt: str | list[int], model: LanguageModel) -> list[int]:
    """Ids of a plain text; control tokens in it are ordinary characters."""
    return model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
