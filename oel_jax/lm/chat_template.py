"""Turns a chat template into a form that a user's text cannot break out of.

A template is rendered once with a stand-in for the user's message. The text around the stand-in is
the template's own and is split at control tokens; the user's text is filled in only afterwards and
encoded as plain text. So whatever the text contains, the control tokens of a prompt are those of
the template. (Rendering the text itself and tokenising the result, as is usual, would turn an
`<|im_end|>` on a game board into the end of the user's turn.)
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from oel_jax.errors import UserError

# Holds characters that a template would have to change if it escaped, quoted or re-cased messages.
_STAND_IN = "oelUserText<&\"'\\>7f3a"
_PAD = "\n "


@dataclasses.dataclass(frozen=True)
class ControlToken:
    """A token that only the template (or the model) may produce, never outside text.

    `special` tokens are dropped when ids are decoded. `lstrip` and `rstrip` tokens swallow the
    blanks before or after them, and `single_word` ones match only between word boundaries.
    """

    id: int
    text: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def pattern(self) -> str:
        core = re.escape(self.text)
        if self.single_word:
            core = rf"(?<!\w){core}(?!\w)"
        return (r"\s*" if self.lstrip else "") + core + (r"\s*" if self.rstrip else "")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A rendered template: control token ids and pieces of plain text, some with the stand-in."""

    parts: tuple[int | str, ...]
    strip_left: bool
    strip_right: bool

    def fill(self, user_text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Ids of the prompt for `user_text`; `encode` must treat its argument as plain text.

        Text of the template that touches the user's text is encoded together with it, so that the
        tokens at the seam are those of an ordinary tokenisation.
        """
        if self.strip_left:
            user_text = user_text.lstrip()
        if self.strip_right:
            user_text = user_text.rstrip()
        ids: list[int] = []
        for part in self.parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += encode(part.replace(_STAND_IN, user_text))
        return ids


def prompt(
    template: str,
    control: Iterable[ControlToken],
    special_texts: Mapping[str, str],
    *,
    thinking: bool,
) -> Prompt:
    """Renders `template` for one user message and the generation prompt.

    Args:
        template: Jinja source of a Hugging Face chat template.
        control: all tokens to recognise in the template's text.
        special_texts: `bos_token` and the like, variables of the template.
        thinking: passed on as `enable_thinking`; templates without it ignore it.

    Raises:
        UserError: the template fails, or does not show the user's message as it is.
    """
    # A padded stand-in shows whether the template trims messages (Llama-3 does).
    text = _render(template, _PAD + _STAND_IN + _PAD[::-1], special_texts, thinking)
    before, found, after = text.partition(_STAND_IN)
    if not found or _STAND_IN in after:
        raise UserError(
            "chat_template does not show the user's message exactly once and unchanged; use a "
            "template that does"
        )
    keeps_left, keeps_right = before.endswith(_PAD), after.startswith(_PAD[::-1])
    before, after = before.removesuffix(_PAD), after.removeprefix(_PAD[::-1])
    ids = {token.text: token.id for token in control}
    # Longest first, so that no token hides one that it is a part of.
    ordered = sorted(control, key=lambda token: len(token.text), reverse=True)
    pattern = "|".join(f"({token.pattern})" for token in ordered)
    parts: list[int | str] = []
    end = 0
    text = before + _STAND_IN + after
    for match in re.finditer(pattern, text) if pattern else ():
        parts += [text[end : match.start()], ids[ordered[match.lastindex - 1].text]]
        end = match.end()
    parts.append(text[end:])
    return Prompt(tuple(p for p in parts if p != ""), not keeps_left, not keeps_right)


def _render(template: str, content: str, special_texts: Mapping[str, str], thinking: bool) -> str:
    """The template's text, in the Jinja environment that transformers gives to chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    # The date in a prompt is the day of the start; it does not change in the middle of a run.
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=[{"role": "user", "content": content}],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            enable_thinking=thinking,
            **special_texts,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"chat_template fails for one user message: {error}") from error


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
