"""Text in, text out: what a notebook wants of a model, without a run around it.

model = oel_jax.load_model("nano")
model.generate("What is two plus three?", temperature=0)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from oel_jax.base.errors import UserError
from oel_jax.chat.render import render
from oel_jax.data.messages import ROLES, Dialogue, Message, user
from oel_jax.models.language_model import LanguageModel, load_model
from oel_jax.models.lengths import padded_length
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.sampler.sampler import Sampler


class ChatModel(LanguageModel):
    """A loaded model that answers: `generate` for texts, `logits` for ids."""

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]],
        *,
        temperature: float = 0.7,
        max_tokens: int = 256,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        thinking: bool = False,
        slots: int = 8,
    ) -> str | list[str]:
        """Answers of the model, through its chat template.

        An answer depends on its own prompt, its place in the list and the arguments, not on what
        else is asked for.

        Args:
          prompts: one text, which becomes a user's message; one conversation, a list of
            {'role': ..., 'content': ...}; or a list of either.
          temperature: 0 takes the most likely token.
          max_tokens: of an answer, its end included; what is longer is cut off.
          top_k: sample among this many tokens; 0: all.
          top_p: sample among the most likely tokens that together have this probability.
          seed: of the random numbers; equal seeds give equal answers.
          thinking: the template's thinking flag.
          slots: answers that are written at once, at most.

        Returns:
          The text of the answer, thoughts included; for a list of prompts a list.

        Raises:
          UserError: an argument that cannot be, a prompt that the template refuses, or one that is
            too long for the model.
        """
        _check(temperature, max_tokens, top_k, top_p, slots)
        single, conversations = _conversations(prompts)
        rendered = [
            render(self.tokenizer, Dialogue(tuple(one)), thinking=thinking) for one in conversations
        ]
        if not rendered:
            return []
        longest = max(map(len, rendered))
        if longest + max_tokens > self.cfg.max_positions:
            raise UserError(
                f"a prompt of {longest} tokens and max_tokens={max_tokens} do not fit into the "
                f"{self.cfg.max_positions} positions of {self.directory}"
            )
        requests = [
            Request(ids, request_key(seed, "generate", index), max_tokens)
            for index, ids in enumerate(rendered)
        ]
        fsdp = self.mesh.shape["fsdp"]
        count = -(-min(slots, len(requests)) // fsdp) * fsdp
        sampler = Sampler(
            self.cfg,
            self.mesh,
            SamplerConfig(
                slots=count,
                length=padded_length(longest) + max_tokens,
                response=max_tokens,
                prefill_rows=count,
                dtype=jax.tree.leaves(self.params)[0].dtype,
            ),
            sampling=Sampling(float(temperature), top_k, float(top_p)),
            limit=self.vocab_limit,
            stop_ids=self.tokenizer.stop_ids,
        )
        texts = [
            self.tokenizer.decode(done.ids) for done in sampler.generate(self.params, requests)
        ]
        return texts[0] if single else texts


def load(path: str | Path, **settings: Any) -> ChatModel:
    """Load a model to talk to; `oel_jax.load_model` is this function.

    Args:
      path: a Hugging Face directory, a hub id, 'nano' or 'nano:SIZE' (bundled models).
      settings: see `oel_jax.models.language_model.load_model`: dtype, mesh, today, check_weights.

    Raises:
      UserError: anything wrong with the directory, naming the file or field.
    """
    return ChatModel(**vars(load_model(path, **settings)))


def _check(temperature: float, max_tokens: int, top_k: int, top_p: float, slots: int) -> None:
    for name, value in (("max_tokens", max_tokens), ("slots", slots)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"generate: {name} is {value!r}; it must be an integer from 1 on")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
        raise UserError(f"generate: top_k is {top_k!r}; it must be an integer from 0 on (0 = off)")
    for name, value, most in (("temperature", temperature, float("inf")), ("top_p", top_p, 1)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= most or (name == "top_p" and value == 0):
            must = "a number from 0 on" if name == "temperature" else "a number in (0, 1]"
            raise UserError(f"generate: {name} is {value!r}; it must be {must}")


def _conversations(prompts: Any) -> tuple[bool, list[list[Message]]]:
    """(whether one answer was asked for, the conversations)."""
    if isinstance(prompts, str):
        return True, [[user(prompts)]]
    if not isinstance(prompts, Sequence):
        raise UserError(f"generate: prompts is {type(prompts).__name__}; {_FORMS}")
    if prompts and all(isinstance(one, Mapping) for one in prompts):
        return True, [_checked(prompts, "prompts")]
    found: list[list[Message]] = []
    for index, one in enumerate(prompts):
        if isinstance(one, str):
            found.append([user(one)])
        elif isinstance(one, Sequence) and one and all(isinstance(m, Mapping) for m in one):
            found.append(_checked(one, f"prompts[{index}]"))
        else:
            raise UserError(f"generate: prompts[{index}] is {type(one).__name__}; {_FORMS}")
    return False, found


def _checked(messages: Sequence[Message], name: str) -> list[Message]:
    for index, message in enumerate(messages):
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise UserError(
                f"generate: {name}[{index}] must have a 'role', one of {', '.join(ROLES)}, and a "
                f"text as 'content'; it is {message!r}"
            )
    return list(messages)


_FORMS = (
    "give a text, a list of texts, a conversation (a list of {'role': ..., 'content': ...}), or a "
    "list of conversations"
)
