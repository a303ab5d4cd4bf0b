"""The frozen teacher: its prompts, and the knowledge prefixes it encodes once per round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp

from oel_jax.data.prompts import with_knowledge
from oel_jax.models.decoder import KeyValues, Params
from oel_jax.models.language_model import LanguageModel
from oel_jax.models.shared_prefix import common_prefix, encode_prefix, padded_length, shared_start


@dataclass(frozen=True)
class KnowledgePrefix:
    """The encoded beginning of every teacher prompt that carries one knowledge text.

    Attributes:
      ids: the tokens it stands for. It is cut at a token, not at a string boundary: whatever BPE
        does where the knowledge ends, `ids` begins every prompt it was made from.
      cache: their keys and values, [L, K, P, H]; P may exceed len(ids), the rest is never seen.
    """

    ids: tuple[int, ...]
    cache: KeyValues


class Teacher:
    """P_r with knowledge in its prompt.

    `prepare` encodes the beginning of the prompts with each text, once for the whole round. A
    prompt that happens to share only a part of it uses that part, so caching never changes a
    result.
    """

    def __init__(
        self, model: LanguageModel, texts: Sequence[str], *, thinking: bool, block: int = 256
    ):
        self.model, self.texts = model, list(texts)
        self._thinking, self._block = thinking, block
        self._prefixes: dict[int, KnowledgePrefix] = {}

    def __repr__(self) -> str:
        return f"Teacher({len(self.texts)} texts, {len(self._prefixes)} encoded, {self.model!r})"

    @property
    def encoded(self) -> list[KnowledgePrefix]:
        """The prefixes encoded so far."""
        return list(self._prefixes.values())

    def prompt(self, text: int, prompt: str, own: str = "") -> list[int]:
        """Teacher prompt ids: the student's user text with text number `text`, or `own`, in it."""
        return self.model.tokenizer.chat(
            with_knowledge(prompt, own or self.texts[text]), thinking=self._thinking
        )

    def split(self, text: int, prompt: str, own: str = "") -> tuple[int, list[int]]:
        """(positions of the prefix that this prompt shares, its remaining ids, at least one).

        Args:
          own: a context of this prompt alone, in the place of the text. It is read each time.
        """
        ids = self.prompt(text, prompt, own)
        shared = min(common_prefix(ids, self._prefixes[text].ids), len(ids) - 1)
        return shared, ids[shared:]

    def prefix(self, text: int) -> KnowledgePrefix:
        """The encoded prefix of a text; `prepare` must have been called."""
        return self._prefixes[text]

    def prepare(self, examples: Sequence[str], own: Sequence[str] = ()) -> None:
        """Encode the prefixes of all texts, once; `examples` are prompts that they will serve.

        Args:
          own: their own contexts, if they have some.
        """
        pairs = list(dict.fromkeys(zip(examples, own or [""] * len(examples), strict=True)))
        for text in range(len(self.texts)) if not self._prefixes else ():
            prompts = [self.prompt(text, *pair) for pair in pairs]
            ids = shared_start(prompts)
            self._prefixes[text] = KnowledgePrefix(ids, self._encode(self.model.params, ids))

    def read_by(self, params: Params, text: int) -> KeyValues:
        """The prefix of a text as other weights of the same shape encode it."""
        return self._encode(params, self._prefixes[text].ids)

    def refresh(self, params: Params) -> None:
        """Take other weights; what is encoded is encoded again."""
        self.model = replace(self.model, params=params)
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
