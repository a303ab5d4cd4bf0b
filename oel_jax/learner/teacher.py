"""The frozen teacher: its prompts, and their shared beginnings, encoded once per round."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import jax.numpy as jnp

from oel_jax.chat.render import render
from oel_jax.data.messages import Context, Dialogue
from oel_jax.models.decoder import KeyValues, Params
from oel_jax.models.language_model import LanguageModel
from oel_jax.models.lengths import common_prefix, padded_length, shared_start
from oel_jax.models.shared_prefix import encode_prefix
from oel_jax.parallel.offload import to_device, to_host


@dataclass(frozen=True)
class KnowledgePrefix:
    """The encoded beginning of every teacher prompt that carries one knowledge text.

    Attributes:
      ids: its tokens. It is cut at a token, not at a string boundary: whatever BPE
        does where the knowledge ends, `ids` begins every prompt it was made from.
      cache: their keys and values, [L, K, P, H]; P may exceed len(ids), the rest is never seen.
    """

    ids: tuple[int, ...]
    cache: KeyValues


class Teacher:
    """P_r, which reads a context in addition to what the student reads.

    `prepare` encodes the beginning of the prompts with each shared context, once for the whole
    round. A prompt that happens to share only a part of it uses that part, so caching never changes
    a result.

    Attributes:
      model: a record of its own, so that where its weights are is no business of others.
      contexts: the shared ones, by their number.
    """

    def __init__(
        self, model: LanguageModel, contexts: Sequence[Context], *, thinking: bool, block: int = 256
    ):
        self.model, self.contexts = copy(model), list(contexts)
        self._thinking, self._block = thinking, block
        self._prefixes: dict[int, KnowledgePrefix] = {}

    def __repr__(self) -> str:
        return (
            f"Teacher({len(self.contexts)} contexts, {len(self._prefixes)} encoded, {self.model!r})"
        )

    @property
    def encoded(self) -> list[KnowledgePrefix]:
        """The prefixes encoded so far."""
        return list(self._prefixes.values())

    def prompt(self, number: int, dialogue: Dialogue, own: Context | None = None) -> list[int]:
        """Prompt ids of a dialogue with shared context `number`, or with its own context."""
        context = self.contexts[number] if own is None else own
        return render(self.model.tokenizer, dialogue, context, thinking=self._thinking)

    def split(
        self, number: int, dialogue: Dialogue, own: Context | None = None
    ) -> tuple[int, list[int]]:
        """(positions of the prefix that this prompt shares, its remaining ids, at least one).

        Args:
          own: a context of this prompt alone, in place of the shared one. It is read each time.
        """
        ids = self.prompt(number, dialogue, own)
        shared = min(common_prefix(ids, self._prefixes[number].ids), len(ids) - 1)
        return shared, ids[shared:]

    def prefix(self, text: int) -> KnowledgePrefix:
        """The encoded prefix of a shared context; `prepare` must have been called."""
        return self._prefixes[text]

    def prepare(self, examples: Sequence[Dialogue], own: Sequence[Context | None] = ()) -> None:
        """Encode the prefixes of all shared contexts, once.

        Args:
          examples: dialogues whose prompts they will serve; without any nothing is shared.
          own: the contexts that the examples have for themselves, if they have some.
        """
        pairs = list(zip(examples, own or [None] * len(examples), strict=True))
        for number in range(len(self.contexts)) if not self._prefixes else ():
            ids = shared_start([self.prompt(number, *pair) for pair in pairs]) if pairs else ()
            self._prefixes[number] = KnowledgePrefix(ids, self._encode(self.model.params, ids))

    def encode_with(self, params: Params, text: int) -> KeyValues:
        """The prefix of a text as other weights of the same shape encode it."""
        return self._encode(params, self._prefixes[text].ids)

    @contextmanager
    def in_host_memory(self) -> Iterator[None]:
        """Within it the weights are in host memory and nothing is read; after it they are back."""
        self.model.params = to_host(self.model.params)
        try:
            yield
        finally:
            self.model.params = to_device(self.model.params)

    def refresh(self, params: Params) -> None:
        """Take other weights; what is encoded is encoded again."""
        self.model.params = params
        for text, old in self._prefixes.items():
            self._prefixes[text] = KnowledgePrefix(old.ids, self._encode(params, old.ids))

    def _encode(self, params: Params, ids: Sequence[int]) -> KeyValues:
        model = self.model
        return encode_prefix(
            model.cfg,
            model.mesh,
            params,
            ids,
            width=padded_length(len(ids), 64),
            block=self._block,
        )


def cache_bytes(prefixes: Sequence[KnowledgePrefix]) -> int:
    """Bytes that the encoded prefixes hold."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for p in prefixes for leaf in p.cache)
