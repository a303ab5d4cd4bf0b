"""Turns a chat template into a form that a user's text cannot break out of.

A template is rendered once with a stand-in for the user's message. The text around the stand-in is
the template's own and is split at control tokens; the user's text is filled in only afterwards and
encoded as plain text. So whatever the text contains, the control tokens of a prompt are those of
the template. (Rendering the text itself and tokenising the result, as is usual, would turn an
`<|im_end|>` on a game board into the end of the user's turn.)
"""

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from string import printable

from oel_jax.chat.control_tokens import ControlToken, Part, split, swallow_blanks
from oel_jax.chat.template_environment import Render, renderer
from oel_jax.data.answers import leaves_open
from oel_jax.errors import UserError

# Holds characters that a template would have to change if it escaped, quoted or re-cased messages.
_STAND_IN = "oelUserText<&\"'\\>7f3a"
# What templates do to the ends of a message; Llama-3 strips it.
_STRIPS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)
_ENDS = ("", " ", "\n", "\n ", " \n", "\t", "\u3000", "\x1c")

Message = str | Sequence[str | ControlToken]


@dataclass(frozen=True)
class Prompt:
    """A rendered template.

    Attributes:
        before: the template's text in front of the user's message.
        after: the text behind it, which ends where the model's response begins.
        strip: what the template does to the ends of a message.
        control: all tokens to recognise in the template's text.
    """

    before: str
    after: str
    strip: Callable[[str], str]
    control: tuple[ControlToken, ...]

    @property
    def opens_thought(self) -> bool:
        """Whether a response begins inside a thought, since the template has written `<think>`."""
        return leaves_open(self.after)

    def shown(self, text: str) -> str:
        """The prompt for a message as one string, as the template renders it."""
        return self.before + self.strip(text) + self.after

    def fill(self, message: Message) -> list[Part]:
        """The prompt for a message: control tokens, and pieces of plain text between them.

        Text of the template that touches the user's text is in one piece with it, so that the
        tokens at the seam are those of an ordinary tokenisation.

        Args:
            message: plain text; or pieces of it with control tokens that are known to be genuine.
        """
        middle = self._stripped([message] if isinstance(message, str) else message)
        inner = "".join(part if isinstance(part, str) else part.text for part in middle)
        parts: list[Part] = [
            *split(self.before, self.control, "", inner + self.after),
            *middle,
            *split(self.after, self.control, self.before + inner, ""),
        ]
        return swallow_blanks(_joined(parts))

    def _stripped(self, message: Sequence[Part]) -> list[Part]:
        """The message as the template shows it; tokens inside it stop the stripping."""
        if len(message) == 1 and isinstance(message[0], str):
            return [self.strip(message[0])]
        parts = list(message)
        # A letter stands for what is not an end of the message.
        if parts and isinstance(parts[0], str):
            parts[0] = self.strip(parts[0] + "x")[:-1]
        if parts and isinstance(parts[-1], str):
            parts[-1] = self.strip("x" + parts[-1])[1:]
        return parts


def _joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbouring texts, made one."""
    joined: list[Part] = []
    for part in parts:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def prompt(
    template: str,
    control: Iterable[ControlToken],
    special_texts: Mapping[str, str],
    *,
    thinking: bool,
    today: datetime.datetime | None = None,
) -> Prompt:
    """Renders `template` for one user message and the generation prompt.

    Args:
        template: Jinja source of a Hugging Face chat template.
        control: all tokens to recognise in the template's text.
        special_texts: `bos_token` and the like, variables of the template.
        thinking: passed on as `enable_thinking`; templates without it ignore it.
        today: the date that the template shows, if it shows one; now, if not given.

    Raises:
        UserError: the template fails, or does not show the user's message as it is.
    """
    render = renderer(template, special_texts, today or datetime.datetime.now())
    text = render(_STAND_IN, thinking)
    before, found, after = text.partition(_STAND_IN)
    if not found or _STAND_IN in after:
        raise UserError(
            "chat_template does not show the user's message exactly once and unchanged; use a "
            "template that does"
        )
    strip = _strip(render, thinking, before, after)
    return Prompt(before, after, strip, tuple(control))


def _strip(render: Render, thinking: bool, before: str, after: str) -> Callable[[str], str]:
    """Which of `_STRIPS` the template does; found by trying."""
    texts = [left + _STAND_IN + right for left, right in product(_ENDS, _ENDS)]
    texts.append(f"{_STAND_IN}\n\n \t  {printable} é\u3000{_STAND_IN}")
    shown = [render(text, thinking) for text in texts]
    for strip in _STRIPS:
        if shown == [before + strip(text) + after for text in texts]:
            return strip
    raise UserError(
        "chat_template changes the user's message in a way that is not supported, such as blanks "
        "inside it; have it show the message as it is, or with `| trim`"
    )
