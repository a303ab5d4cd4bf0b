"""A sampler whose answers come from a function or a table."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from oel_jax.chat.tokenizer import Tokenizer, load_tokenizer
from oel_jax.runs import samplers
from oel_jax.sampler.requests import Completion, Request

Script = Callable[[str], str] | Mapping[str, str]


class ScriptedSampler:
    """Takes requests and answers them as `oel_jax.sampler.sampler.Sampler` does, from a script.

    An answer is cut at the request's budget, `max_new` tokens; one that fits ends with a stop
    token. Log-probabilities are zero.

    Attributes:
      prompts: the text of every prompt so far, in the order of their answers.
      generated: tokens of all answers so far.
    """

    def __init__(self, script: Script, tokenizer: Tokenizer, *, at_once: int = 8):
        """Args:
        script: from the prompt's text, special tokens left out, to the answer's text. A table is
          looked through in its order: the first key that is a part of the prompt decides, and a
          prompt without any raises LookupError. `<think>` and `</think>` in an answer become the
          control tokens, if the tokenizer has them.
        tokenizer: of the model in whose place this is.
        at_once: requests that one `poll` answers.
        """
        self._script, self._tokenizer, self._at_once = script, tokenizer, at_once
        self._pending: deque[Request] = deque()
        self.prompts: list[str] = []
        self.generated = 0
        self.encoded = 0
        self.bytes = 0
        self.draft = 0

    @property
    def written(self) -> int:
        """Tokens of all answers so far."""
        return self.generated

    @property
    def busy(self) -> bool:
        """Whether a request waits for its answer."""
        return bool(self._pending)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests."""
        self._pending.extend(requests)

    def poll(self, params: Any = None) -> list[Completion]:
        """Answers to the oldest requests, at most `at_once`; `params` are not looked at."""
        count = min(self._at_once, len(self._pending))
        return [self._answered(self._pending.popleft()) for _ in range(count)]

    def generate(
        self,
        params: Any,
        requests: Sequence[Request],
        safe_place: Callable[[], None] = lambda: None,
    ) -> list[Completion]:
        """Answers to all requests, in their order; `safe_place` is called between them."""
        answers = []
        for request in requests:
            answers.append(self._answered(request))
            safe_place()
        return answers

    def forget(self) -> None:
        """Nothing is kept between answers."""

    def drafts(self) -> tuple[int, int]:
        """(tokens drafted, drafted tokens kept): none."""
        return 0, 0

    def _answered(self, request: Request) -> Completion:
        prompt = self._tokenizer.decode(request.prompt)
        self.prompts.append(prompt)
        end = request.stop_ids or self._tokenizer.stop_ids
        ids = [*_encode(self._tokenizer, self._said(prompt)), *end[:1]]
        stopped = len(ids) <= request.max_new
        ids = ids[: request.max_new]
        self.generated += len(ids)
        self.encoded += len(request.prompt)
        return Completion(request.tag, ids, np.zeros(len(ids), np.float32), stopped)

    def _said(self, prompt: str) -> str:
        if callable(self._script):
            return self._script(prompt)
        for key, answer in self._script.items():
            if key in prompt:
                return answer
        raise LookupError(f"the script has no answer to {prompt[-200:]!r}")


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of an answer, its thought markers as control tokens."""
    markers = {one.text: one.id for one in tokenizer.control.values() if not one.special}
    if not markers:
        return tokenizer.encode(text)
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, markers))})", text):
        if part:
            ids += [markers[part]] if part in markers else tokenizer.encode(part, first=not ids)
    return ids


@contextmanager
def scripted(script: Script, model: str | Path) -> Iterator[list[ScriptedSampler]]:
    """Let a script answer wherever a run of this process would sample.

    Args:
      script: see `ScriptedSampler`.
      model: directory of the run's model, whose tokenizer is used.

    Yields: the samplers made so far, for their `prompts`.
    """
    tokenizer, made = load_tokenizer(Path(model)), []
    original = samplers.RunSampler

    def build(*_: Any, **__: Any) -> ScriptedSampler:
        made.append(ScriptedSampler(script, tokenizer))
        return made[-1]

    samplers.RunSampler = build
    try:
        yield made
    finally:
        samplers.RunSampler = original
