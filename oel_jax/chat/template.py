"""A chat template that outside text cannot break out of.

A template renders a whole conversation, as in transformers. The text of messages goes in as strings
that know where they come from (`Traced`), so that afterwards each character is the template's or
from outside, even where the template stripped, split or dropped parts of a message. The template's
text is split at control tokens; the rest is encoded as plain text. So whatever a message contains,
the control tokens of a prompt are those of the template. (Tokenising the rendered text as a whole,
as is usual, would turn an `<|im_end|>` on a game board into the end of the user's turn.)
"""

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from string import printable
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.chat.control_tokens import ControlToken, Part, split, swallow_blanks
from oel_jax.chat.origins import Origins, trace
from oel_jax.chat.template_environment import Renderer
from oel_jax.chat.traced import OUTSIDE, TEMPLATE, Traced, origin_of, plain, runs
from oel_jax.data.answers import leaves_open
from oel_jax.data.messages import Message

# Holds characters that a template would have to change if it escaped, quoted or re-cased messages.
_STAND_IN = "oelUserText<&\"'\\>7f3a"
_ENDS = ("", " ", "\n", "\n ", " \n", "\t", "\u3000", "\x1c")

# A label is 2 * (number of the message + 1) + (1 if an assistant said it), as one character.
_NOBODY = chr(0)


@dataclass(frozen=True)
class RenderedText:
    """A rendered conversation, before it is encoded.

    Attributes:
        text: the template's rendering, traced.
        control: all tokens to recognise in the template's text.
        origins: what the sources in `text` are.
        labels: one character for each of the text's, see `label`.
    """

    text: str
    control: tuple[ControlToken, ...]
    origins: Origins
    labels: str

    @property
    def opens_thought(self) -> bool:
        """Whether a response begins inside a thought, since the template has written `<think>`."""
        return leaves_open("\0".join(self._texts(TEMPLATE)))

    @property
    def template_text(self) -> str:
        """The characters that the template itself has written."""
        return "".join(self._texts(TEMPLATE))

    @property
    def outside_text(self) -> str:
        """The characters from outside."""
        return "".join(self._texts(OUTSIDE))

    @property
    def unseen(self) -> tuple[str, ...]:
        """The messages, tool calls and tools that have text of which the template shows none."""
        shown = {self.origins.name(ord(code) >> 1) for code in set(origin_of(self.text))}
        return tuple(
            name for source in sorted(self.origins.used)
            if (name := self.origins.name(source)) not in shown
        )  # fmt: skip

    def parts(self) -> list[tuple[Part, str]]:
        """The conversation in parts, each with its labels.

        Control tokens have one label; pieces of plain text between them have one for each
        character. Text of the template that touches outside text is in one piece with it, so that
        the tokens at the seam are those of an ordinary tokenisation.
        """
        pieces: list[Part] = []
        token_labels: list[str] = []
        end = 0
        for piece in self._split():
            width = len(piece.text if isinstance(piece, ControlToken) else piece)
            labels = self.labels[end : end + width]
            end += width
            if isinstance(piece, ControlToken):
                pieces.append(piece)
                token_labels.append(_strongest(labels))
            elif pieces and isinstance(pieces[-1], str):
                pieces[-1] += Traced(piece, labels)
            else:
                pieces.append(Traced(piece, labels))
        following = iter(token_labels)
        return [
            (part, next(following)) if isinstance(part, ControlToken)
            else (plain(part), origin_of(part))
            for part in swallow_blanks(pieces)
        ]  # fmt: skip

    def _texts(self, kind: int) -> list[str]:
        text = plain(self.text)
        return [text[start:end] for own, start, end in self._runs() if own == kind]

    def _runs(self) -> list[tuple[int, int, int]]:
        """(kind, start, end), the kind being TEMPLATE, OUTSIDE or a genuine token's source."""
        found: list[tuple[int, int, int]] = []
        for code, start, end in runs(origin_of(self.text)):
            source = ord(code) >> 1
            kind = source if source == TEMPLATE or source in self.origins.tokens else OUTSIDE
            if found and found[-1][0] == kind:
                start = found.pop()[1]
            found.append((kind, start, end))
        return found

    def _split(self) -> list[Part]:
        """All of the text as the template's control tokens and other text, in order."""
        found: list[Part] = []
        text = plain(self.text)
        for kind, start, end in self._runs():
            run = text[start:end]
            if kind == TEMPLATE:
                before, after = text[max(start - 1, 0) : start], text[end : end + 1]
                found += split(run, self.control, before, after)
            elif kind == OUTSIDE:
                found.append(run)
            else:
                token = self.origins.tokens[kind][1]
                times, rest = divmod(len(run), len(token.text))
                if rest or run != token.text * times:
                    raise UserError(
                        f"chat_template changes the token {token.text!r} inside a message to "
                        f"{run!r}; use a template that does not"
                    )
                found += [token] * times
        return found


def _strongest(labels: str) -> str:
    """The label of a token that holds these characters: an assistant's, or else a message's."""
    return max(labels, key=lambda label: (ord(label) & 1, label != _NOBODY), default=_NOBODY)


def label_of(labels: str, start: int, end: int) -> tuple[int, bool]:
    """(number of the message or -1, whether an assistant said it) for a token of a text.

    Args:
        labels: of the text, see `RenderedText.parts`.
        start: the token's first character.
        end: the character after its last one.
    """
    code = ord(_strongest(labels[start : max(end, start + 1)]))
    return code // 2 - 1, bool(code & 1)


class ChatTemplate:
    """The chat template of a model."""

    def __init__(
        self,
        template: str,
        control: Iterable[ControlToken],
        special_texts: Mapping[str, str],
        today: datetime.datetime | None = None,
    ):
        """Compiles a template.

        Args:
            template: Jinja source of a Hugging Face chat template.
            control: all tokens to recognise in the template's text.
            special_texts: `bos_token` and the like, variables of the template.
            today: the date that the template shows, if it shows one; now, if not given.

        Raises:
            UserError: the source is not Jinja.
        """
        self._control = {token.id: token for token in control}
        texts = sorted((token.text for token in self._control.values()), key=len, reverse=True)
        self._built = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._renderer = Renderer(template, special_texts, today or datetime.datetime.now())

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
    ) -> RenderedText:
        """Renders a conversation; see `Tokenizer.render`.

        Raises:
            UserError: a message is malformed; the template fails; or it builds a control token of
                text from outside.
        """
        made, schemas, origins = trace(messages, tools, self._control)
        try:
            text = self._text(made, schemas, add_generation_prompt, thinking)
        except UserError:
            if all("content" in message for message in made):
                raise
            # Some templates read the content of every message.
            made = [{"content": ""} | message for message in made]
            text = self._text(made, schemas, add_generation_prompt, thinking)
        if self._built is not None:
            _refuse_built_tokens(text, self._built, origins)
        roles = [message["role"] for message in made]
        labels = _labels(text, roles, origins, self._renderer.marks_answers)
        return RenderedText(text, tuple(self._control.values()), origins, labels)

    def _text(self, messages: Any, tools: Any, prompt: bool, thinking: bool | None) -> str:
        return self._renderer(messages, tools, add_generation_prompt=prompt, thinking=thinking)

    def check(self, thinking: bool | None) -> RenderedText:
        """The prompt for a stand-in, after a look at what the template does to messages.

        Raises:
            UserError: the template fails for one user message, or does not show it as it is.
        """
        first = self._lone(_STAND_IN, thinking)
        if first.outside_text != _STAND_IN:
            raise UserError(
                "chat_template does not show the user's message exactly once and unchanged; use a "
                "template that does"
            )
        texts = [left + _STAND_IN + right for left, right in product(_ENDS, _ENDS)]
        texts.append(f"{_STAND_IN}\n\n \t  {printable} é\u3000{_STAND_IN}")
        for text in texts:
            made = self._lone(text, thinking)
            shown = made.outside_text
            whole = plain(made.text) == plain(first.text).replace(_STAND_IN, shown)
            if not whole or shown not in text or text.strip() not in shown:
                raise UserError(
                    "chat_template changes the user's message in a way that is not supported, such "
                    "as blanks inside it; have it show the message as it is, or with `| trim`"
                )
        return first

    def _lone(self, text: str, thinking: bool | None) -> RenderedText:
        return self.render([{"role": "user", "content": text}], thinking=thinking)


def _refuse_built_tokens(text: str, pattern: re.Pattern[str], origins: Origins) -> None:
    """UserError for a control token that is made of outside text, although no message spells it.

    A template that writes `'<|' + message.name + '|>'` means a control token, but the name is text
    from outside.
    """
    codes = origin_of(text)
    for match in pattern.finditer(plain(text)):
        kinds = {ord(code) >> 1 for code in codes[match.start() : match.end()]}
        built = kinds - {TEMPLATE} and not kinds & origins.tokens.keys()
        if built and not any(match[0] in one for one in origins.texts):
            raise UserError(
                f"chat_template builds {match[0]!r} from the text of a message, but text from "
                "outside never becomes a control token; write the token out in the template"
            )


def _labels(text: str, roles: Sequence[str], origins: Origins, marked: bool) -> str:
    """One label for each character.

    Args:
        marked: the template says itself, with `{% generation %}`, what an assistant said.
    """
    found: list[tuple[int, bool, int]] = []  # owner, whether an assistant's, length
    last, gap = -1, -1  # the message of the last text from outside; the template's text after it
    for code, start, end in runs(origin_of(text)):
        owner, said = origins.message(ord(code) >> 1), bool(ord(code) & 1)
        if not marked:
            said = owner >= 0 and roles[owner] == "assistant"
            if ord(code) >> 1 == TEMPLATE:
                gap = len(found)
            elif said and owner == last and gap == len(found) - 1:
                found[gap] = owner, True, found[gap][2]
            if ord(code) >> 1 != TEMPLATE:
                last = owner
        found.append((owner, said, end - start))
    return "".join(chr(2 * (owner + 1) + said) * length for owner, said, length in found)
