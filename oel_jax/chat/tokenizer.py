"""Text to token ids and back, with outside text that can never make a control token.

Two kinds of model directories are read; weights are not needed.

*Hugging Face*: `tokenizer.json`, with `tokenizer_config.json` for the chat template and the names
of special tokens. All of its added tokens are control tokens, also those that are not "special"
(`<think>`, `<tool_call>`).

*SentencePiece*: `tokenizer.model` (when there is no `tokenizer.json`). Its control tokens are the
pieces of type CONTROL (`control_symbols` in training, which never match in text; the piece type
`user_defined_symbols` does). `tokenizer_config.json` gives `chat_template`, and `eos_token` and
`pad_token` by name.

In both, the template may also be a `chat_template.jinja` file; the stop ids are the `eos_token_id`
of `generation_config.json` (one or several), else of `config.json`, else the tokenizer's own; and
`<think>` and `</think>` survive decoding (spec 6.1 step 5), all other special tokens are dropped.

Prompts have the ids that transformers makes of the rendered template with the files as they are
(`PreTrainedTokenizerFast`), as long as no text from outside spells out a control token. When a
directory is loaded, both ways are compared on a few texts; a tokenizer that they differ for is
refused.
"""

import datetime
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_object
from oel_jax.chat import template
from oel_jax.chat.control_tokens import ControlToken, Part
from oel_jax.chat.plain_text import is_plain, kinds, plain_tokenizers
from oel_jax.chat.tokenizer_files import (
    KEPT,
    added_tokens,
    chat_templates,
    optional_object,
    read_config,
    special_texts,
    stop_ids,
)
from oel_jax.chat.traced import plain
from oel_jax.data.messages import Message

_FLAGS = ("id", "special", "lstrip", "rstrip", "single_word", "normalized")
# What both ways of making ids are compared on: blanks at the ends and inside, digits, scripts.
_PROBES = (
    "You play a game. Go up or down: [up]",
    "  two  blanks \n\n and lines\n",
    "\tNo. 1234, it's 56!\n ",
    " Äé e\u0301 √ 中文 한 \U0001f600 ﬁ ½\u3000",
    "x",
)


Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as a model reads it.

    Attributes:
        ids: token ids, n of them.
        assistant_mask: n flags: the id holds text that an assistant's message gave. Where the
            template has `{% generation %}` blocks, these say it, as in transformers. Elsewhere it
            is the message's own text, and what the template writes between two pieces of it (the
            end of a thought, the frame of a tool call); the header and the end of the turn are not.
        messages: n numbers: the message whose text the id holds (the first of them, where two
            share an id), or -1 for the template's own text.
        unseen: what has text of which the template shows nothing: 'messages[0]',
            'messages[3].tool_calls', 'tools'. Templates drop what they do not know, in silence.
        opens_thought: a response begins inside a thought, since the template has written
            `<think>`.
    """

    ids: tuple[int, ...]
    assistant_mask: tuple[bool, ...]
    messages: tuple[int, ...]
    unseen: tuple[str, ...]
    opens_thought: bool


class Tokenizer(ABC):
    """A tokenizer of either kind.

    Attributes:
        vocab_size: ids from here on do not exist (padding rows of the embedding): never sample one.
        stop_ids: any of these ends a response.
        pad_id: filler of padded rows.
        control: the tokens that `encode` never returns, by id (but "unknown", if it is one).
    """

    vocab_size: int
    stop_ids: tuple[int, ...]
    pad_id: int
    control: Mapping[int, ControlToken]

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        control: list[ControlToken],
        today: datetime.datetime | None,
    ):
        self.control = {token.id: token for token in control}
        self._directory = directory
        self._today = today
        self._specials = special_texts(config)
        self._sources = chat_templates(directory, config)
        self._templates: dict[str, template.ChatTemplate] = {}
        self._opens: dict[bool | None, bool] = {}
        ids = {token.text: token.id for token in control}
        self.stop_ids = stop_ids(directory, ids.get(self._specials.get("eos_token", "")))
        pad = ids.get(self._specials.get("pad_token", ""))
        self.pad_id = self.stop_ids[0] if pad is None else pad

    @abstractmethod
    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of plain text; control tokens written out in it are ordinary characters.

        Args:
            first: the text begins a sequence. Some tokenizers put a blank there and nowhere else.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids: special tokens dropped, `<think>` and `</think>` kept."""

    @abstractmethod
    def encode_spans(self, text: str, *, first: bool = True) -> tuple[list[int], list[Span]]:
        """Ids as `encode` gives them, with [start, end) of the characters that each stands for."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
    ) -> Rendered:
        """Ids of a conversation in the model's chat template, and which of them are an answer's.

        The ids are those of transformers' `apply_chat_template(tokenize=True)`, as long as no text
        of a message or a tool spells out a control token. Where one does, it stays plain text: the
        control tokens are those that the template writes, and no others. What the template does to
        messages (strips them, drops earlier thoughts, leaves out a role) is done here too.

        The ids of a conversation's beginning, made without a generation prompt, begin the ids of
        the whole, as long as the template shows the beginning the same way (some drop the thoughts
        of earlier turns) and separates turns by control tokens. The ids of a prompt do, too, unless
        the answer's first characters merge with the prompt's last ones (a newline after a newline):
        ids that were sampled must be kept, not rendered again.

        Args:
            messages: at least one, as in OpenAI's chat format. `role` is one of system, developer,
                user, assistant, tool. `content` is a text, or a list of parts that follow each
                other with nothing between them: texts, `{"type": "text", "text": ...}`, and ids of
                control tokens that belong there (whoever gives ids vouches for them). An
                assistant's message may lack it. Other keys (`reasoning_content`, `tool_calls`,
                `tool_call_id`, `name`) go to the template as they are; keys with None are left out.
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: end with the beginning of an assistant's message.
            thinking: thinking flag of the template (`enable_thinking`); None leaves it out.

        Raises:
            UserError: the model directory has no usable chat template; the template refuses the
                conversation; a message is malformed (the error names it).
        """
        made = self._template(thinking, tools)
        try:
            text = made.render(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                thinking=thinking,
            )
            parts = text.parts()
        except UserError as error:
            raise UserError(f"{self._directory}: {error}") from error
        ids: list[int] = []
        labels: list[tuple[int, bool]] = []
        for index, (part, letters) in enumerate(parts):
            if isinstance(part, ControlToken):
                ids.append(part.id)
                labels.append(template.label_of(letters, 0, 1))
            else:
                found, spans = self.encode_spans(part, first=index == 0)
                ids += found
                labels += [template.label_of(letters, *span) for span in spans]
        return Rendered(
            ids=tuple(ids),
            assistant_mask=tuple(said for _, said in labels),
            messages=tuple(message for message, _ in labels),
            unseen=text.unseen,
            opens_thought=text.opens_thought,
        )

    def chat(self, message: str | Sequence[str | int], *, thinking: bool) -> list[int]:
        """Ids of one user message and the generation prompt (spec 4.1).

        Args:
            message: plain text; or pieces of it with the ids of control tokens that belong there.
                Whoever gives ids vouches for them.
            thinking: thinking flag of the template.

        Raises:
            UserError: the model directory has no usable chat template.
        """
        return self.encode_parts(self.chat_parts(message, thinking=thinking))

    def chat_parts(self, message: str | Sequence[str | int], *, thinking: bool) -> list[Part]:
        """The prompt of `chat` as control tokens and the plain text between them."""
        made = self._template(thinking)
        try:
            rendered = made.render([{"role": "user", "content": message}], thinking=thinking)
            return [part for part, _ in rendered.parts()]
        except UserError as error:
            raise UserError(f"{self._directory}: {error}") from error

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Ids of a prompt that is given in parts."""
        ids: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, ControlToken):
                ids.append(part.id)
            else:
                ids += self.encode(part, first=index == 0)
        return ids

    def opens_thought(self, *, thinking: bool) -> bool:
        """Whether a response begins inside a thought, since the template has written `<think>`."""
        self._template(thinking)
        return self._opens[thinking]

    def _template(
        self, thinking: bool | None, tools: Sequence[Any] | None = None
    ) -> template.ChatTemplate:
        """The chat template, checked with this flag when it is first asked for."""
        if not self._sources:
            raise UserError(
                f"{self._directory} has no chat template: add chat_template.jinja, or the field "
                "chat_template in tokenizer_config.json, from the original model"
            )
        try:
            if thinking not in self._opens:
                made = self._compiled("default")
                lone = made.check(thinking)
                self._check(made, lone, thinking)
                self._opens[thinking] = lone.opens_thought
            has_own = tools is not None and "tool_use" in self._sources
            return self._compiled("tool_use" if has_own else "default")
        except UserError as error:
            raise UserError(f"{self._directory}: {error}") from error

    def _compiled(self, name: str) -> template.ChatTemplate:
        if name not in self._templates:
            self._templates[name] = template.ChatTemplate(
                self._sources[name], self.control.values(), self._specials, self._today
            )
        return self._templates[name]

    def _check(
        self, made: template.ChatTemplate, lone: template.RenderedText, thinking: bool | None
    ) -> None:
        """UserError if prompts would have other ids than in transformers."""
        known = {token.text for token in self.control.values()}
        for name, text in self._specials.items():
            if text and text not in known and text in lone.template_text:
                raise UserError(
                    f"the chat template shows {text!r}, the {name} of tokenizer_config.json, which "
                    "the tokenizer does not have; take all files from one model"
                )


class HuggingFaceTokenizer(Tokenizer):
    """`tokenizer.json` through the `tokenizers` library, without torch or transformers."""

    def __init__(self, directory: Path, today: datetime.datetime | None = None):
        import tokenizers  # a second of loading that a SentencePiece model does not need

        config = read_config(directory)
        data = read_object(directory / "tokenizer.json")
        if not isinstance(data.get("model"), dict):
            raise UserError(f"{directory / 'tokenizer.json'} has no model; copy it again")
        added = added_tokens(directory, data, config)
        data |= {"truncation": None, "padding": None, "added_tokens": added}
        try:
            unmarked = plain_tokenizers(data, added)
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(data))
            self._plain = [tokenizers.Tokenizer.from_str(json.dumps(one)) for one in unmarked]
        except UserError as error:
            raise UserError(f"{directory}: {error}") from error
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"{directory / 'tokenizer.json'} cannot be read by tokenizers "
                f"{tokenizers.__version__}: {error}"
            ) from error
        for token in added:
            if self._backend.token_to_id(token["content"]) != token["id"]:
                raise UserError(
                    f"{directory}: tokenizer.json and tokenizer_config.json disagree about the id "
                    f"of {token['content']!r}; take both files from one model"
                )
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        control = [
            ControlToken(text=token["content"], **{flag: token[flag] for flag in _FLAGS})
            for token in added
            if not is_plain(token)
        ]
        super().__init__(directory, config, control, today)
        # "Unknown" stands for characters that the vocabulary lacks; it controls nothing.
        model = data["model"]
        unknown = {model.get("unk_id"), self._backend.token_to_id(model.get("unk_token") or "")}
        self._never = self.control.keys() - unknown
        self._kinds = kinds(data)
        clean = config.get("clean_up_tokenization_spaces") and model.get("type") != "BPE"
        self._clean_up = _clean_up if clean else str

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        return self._checked(self._encoding(text, first).ids)

    def encode_spans(self, text: str, *, first: bool = True) -> tuple[list[int], list[Span]]:
        made = self._encoding(text, first)
        return self._checked(made.ids), made.offsets

    def _encoding(self, text: str, first: bool) -> Any:
        return self._plain[0 if first else -1].encode(text, add_special_tokens=False)

    def _checked(self, ids: list[int]) -> list[int]:
        if not self._never.isdisjoint(ids):
            unsafe = next(i for i in ids if i in self._never)
            raise UserError(
                f"{self._directory}: plain text produces the added token "
                f"{self.control[unsafe].text!r}; this kind of tokenizer.json is not supported"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._clean_up(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def _check(
        self, made: template.ChatTemplate, lone: template.RenderedText, thinking: bool | None
    ) -> None:
        super()._check(made, lone, thinking)
        texts = [token.text for token in self.control.values()]
        for probe in _PROBES:
            if any(text in probe for text in texts):  # there the ids are meant to differ
                continue
            rendered = made.render([{"role": "user", "content": probe}], thinking=thinking)
            ids = self.encode_parts([part for part, _ in rendered.parts()])
            if ids != self._backend.encode(plain(rendered.text), add_special_tokens=False).ids:
                late = sorted({token.text for token in self.control.values() if token.normalized})
                hint = (
                    f". Its added tokens {', '.join(late[:9])} are matched after normalising: "
                    'give them "normalized": false in tokenizer.json'
                    if late
                    else ""
                )
                raise UserError(
                    f"tokenizer.json ({self._kinds}) makes other ids of a prompt as a whole, as "
                    "transformers does, than of the text between its control tokens; this kind is "
                    f"not supported{hint}"
                )


def _clean_up(text: str) -> str:
    """What transformers does to decoded text with `clean_up_tokenization_spaces`."""
    for end in (".", "?", "!", ",", "' ", "n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {end}", end.rstrip())
    return text


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `tokenizer.model`, whose CONTROL pieces are the control tokens."""

    def __init__(self, directory: Path, today: datetime.datetime | None = None):
        import sentencepiece  # only needed here

        path = directory / "tokenizer.model"
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is not a SentencePiece model: {error}") from error
        self.vocab_size = self._model.GetPieceSize()
        pieces = [self._model.IdToPiece(i) for i in range(self.vocab_size)]
        control = [
            ControlToken(i, piece, special=piece not in KEPT)
            for i, piece in enumerate(pieces)
            if self._model.IsControl(i)
        ]
        config = read_config(directory)
        self._refuse_unlike(path, config)
        super().__init__(directory, config, control, today)
        named = {pieces[i] for i in (*self.stop_ids, self.pad_id) if i < self.vocab_size}
        loose = sorted((named | set(KEPT) & set(pieces)) - {token.text for token in control})
        if loose:
            raise UserError(
                f"{path}: {', '.join(loose)} must be control_symbols, or plain text could make them"
            )

    def _refuse_unlike(self, path: Path, config: Mapping[str, Any]) -> None:
        """UserError for what transformers reads from elsewhere, or not as SentencePiece does."""
        pieces = {self._model.IdToPiece(i) for i in range(self.vocab_size)}
        added = [token["content"] for token in (config.get("added_tokens_decoder") or {}).values()]
        added += optional_object(path.with_name("added_tokens.json"))
        beyond = sorted(set(added) - pieces)
        as_it_is = all(
            self._model.Normalize(text) == text.replace(" ", "\u2581") for text in _PROBES
        )
        if beyond or not as_it_is:
            why = (
                f"it does not have the added tokens {', '.join(beyond[:9])}"
                if beyond
                else "it changes text (normalization_rule_name, add_dummy_prefix or "
                "remove_extra_whitespaces), which transformers does otherwise"
            )
            raise UserError(
                f"{path}: {why}; a tokenizer.json is needed: load the directory with "
                "transformers.AutoTokenizer.from_pretrained and write it with save_pretrained"
            )

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        return self._model.EncodeAsIds(text)

    def encode_spans(self, text: str, *, first: bool = True) -> tuple[list[int], list[Span]]:
        # The text is not changed (`_refuse_unlike`), so pieces are as long as what they stand for.
        pieces = self._model.EncodeAsPieces(text)
        ids = [self._model.PieceToId(piece) for piece in pieces]
        spans: list[Span] = []
        end = bytes_left = 0
        for i, piece in zip(ids, pieces, strict=True):
            if self._model.IsByte(i) and not bytes_left:
                bytes_left = len(text[end].encode())
            length = 1 if bytes_left else len(piece)
            spans.append((end, end + length))
            bytes_left = max(bytes_left - 1, 0)
            end += 0 if bytes_left else length
        return ids, spans

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        for i in (*map(int, ids), -1):  # -1 ends the last run
            if 0 <= i < self.vocab_size and i not in self.control:
                run.append(i)
                continue
            parts.append(self._model.DecodeIds(run) if run else "")
            run = []
            if i in self.control and not self.control[i].special:
                parts.append(self.control[i].text)
        return "".join(parts)


def load_tokenizer(directory: Path, today: datetime.datetime | None = None) -> Tokenizer:
    """The tokenizer of a model directory.

    Args:
        directory: of the model.
        today: the date that its chat template shows, if it shows one, in local time. A run gives
            the date of its start (`Workdir.today`); without it, it is now.

    Raises:
        UserError: there are no tokenizer files, or they are damaged or contradict each other.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(directory, today)
    if (directory / "tokenizer.model").is_file():
        return SentencePieceTokenizer(directory, today)
    raise UserError(
        f"{directory} has no tokenizer: it needs tokenizer.json (with tokenizer_config.json) or a "
        "SentencePiece tokenizer.model. Copy these files from the original model; without them "
        "the model computes logits, but reads and writes no text"
    )
