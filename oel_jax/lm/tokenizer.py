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
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from oel_jax.errors import UserError
from oel_jax.lm import chat_template
from oel_jax.lm.chat_template import ControlToken
from oel_jax.lm.config import read_json

_KEPT = ("<think>", "</think>")


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

    def __init__(self, directory: Path, config: Mapping[str, Any], control: list[ControlToken]):
        self.control = {token.id: token for token in control}
        self._directory = directory
        self._specials = _special_texts(config)
        self._template = _template(directory, config)
        ids = {token.text: token.id for token in control}
        self.stop_ids = _stop_ids(directory, ids.get(self._specials.get("eos_token", "")))
        pad = ids.get(self._specials.get("pad_token", ""))
        self.pad_id = self.stop_ids[0] if pad is None else pad

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of plain text; control tokens written out in it are ordinary characters."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids: special tokens dropped, `<think>` and `</think>` kept."""

    def chat(self, user_text: str, *, thinking: bool) -> list[int]:
        """Ids of one user message and the generation prompt (spec 4.1).

        Raises:
            UserError: the model directory has no usable chat template.
        """
        return self._prompts[thinking].fill(user_text, self.encode)

    @cached_property
    def _prompts(self) -> dict[bool, chat_template.Prompt]:
        if self._template is None:
            raise UserError(
                f"{self._directory} has no chat template: add chat_template.jinja, or the field "
                "chat_template in tokenizer_config.json, from the original model"
            )
        try:
            return {
                thinking: chat_template.prompt(
                    self._template, self.control.values(), self._specials, thinking=thinking
                )
                for thinking in (True, False)
            }
        except UserError as error:
            raise UserError(f"{self._directory}: {error}") from error


class HuggingFaceTokenizer(Tokenizer):
    """`tokenizer.json` through the `tokenizers` library, without torch or transformers."""

    def __init__(self, directory: Path):
        import tokenizers  # a second of loading that a SentencePiece model does not need

        config = _optional_json(directory / "tokenizer_config.json")
        data = read_json(directory / "tokenizer.json")
        if not isinstance(data.get("model"), dict):
            raise UserError(f"{directory / 'tokenizer.json'} has no model; copy it again")
        added = _added_tokens(data, config)
        data |= {"truncation": None, "padding": None, "added_tokens": added}
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(data))
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(_without_added(data)))
        control = [
            ControlToken(**{"text": a["content"]} | {k: a[k] for k in _FLAGS if k in a})
            for a in added
        ]
        for token in control:
            if self._backend.token_to_id(token.text) != token.id:
                raise UserError(
                    f"{directory}: tokenizer.json and tokenizer_config.json disagree about the id "
                    f"of {token.text!r}; take both files from one model"
                )
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        super().__init__(directory, config, control)
        # "Unknown" stands for characters that the vocabulary lacks; it controls nothing.
        model = data["model"]
        unknown = {model.get("unk_id"), self._backend.token_to_id(model.get("unk_token") or "")}
        self._never = self.control.keys() - unknown

    def encode(self, text: str) -> list[int]:
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if not self._never.isdisjoint(ids):
            unsafe = next(i for i in ids if i in self._never)
            raise UserError(
                f"{self._directory}: plain text produces the added token "
                f"{self.control[unsafe].text!r}; this kind of tokenizer.json is not supported"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `tokenizer.model`, whose CONTROL pieces are the control tokens."""

    def __init__(self, directory: Path):
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
            ControlToken(i, piece, special=piece not in _KEPT)
            for i, piece in enumerate(pieces)
            if self._model.IsControl(i)
        ]
        super().__init__(directory, _optional_json(directory / "tokenizer_config.json"), control)
        named = {pieces[i] for i in (*self.stop_ids, self.pad_id) if i < self.vocab_size}
        loose = sorted((named | set(_KEPT) & set(pieces)) - {token.text for token in control})
        if loose:
            raise UserError(
                f"{path}: {', '.join(loose)} must be control_symbols, or plain text could make them"
            )

    def encode(self, text: str) -> list[int]:
        return self._model.EncodeAsIds(text)

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


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory.

    Raises:
        UserError: there are no tokenizer files, or they are damaged or contradict each other.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(directory)
    if (directory / "tokenizer.model").is_file():
        return SentencePieceTokenizer(directory)
    raise UserError(
        f"{directory} has no tokenizer: it needs tokenizer.json (with tokenizer_config.json) or a "
        "SentencePiece tokenizer.model. Copy these files from the original model; without them "
        "the model computes logits, but reads and writes no text"
    )


_FLAGS = ("id", "special", "lstrip", "rstrip", "single_word")


def _added_tokens(data: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Added tokens of tokenizer.json and of tokenizer_config.json, merged as in transformers."""
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    try:
        added = {token["content"]: dict(token) for token in data.get("added_tokens") or []}
        for key, token in (config.get("added_tokens_decoder") or {}).items():
            added.setdefault(token["content"], flags | token | {"id": int(key)})
        special = set(_special_texts(config).values()) | _extra_specials(config)
        for text, token in added.items():
            token["special"] = (token["special"] or text in special) and text not in _KEPT
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the added tokens of tokenizer.json or tokenizer_config.json are damaged ({error!r}); "
            "copy both files again"
        ) from error
    return sorted(added.values(), key=lambda token: token["id"])


def _without_added(data: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer that knows no added token at all.

    Some vocabularies list the added tokens too, and some models look whole words up in them; there
    they are removed as well, except the unknown token, which the model itself refers to.
    """
    model = dict(data["model"])
    if isinstance(model.get("vocab"), dict):
        gone = {token["content"] for token in data["added_tokens"]} - {model.get("unk_token")}
        model["vocab"] = {text: i for text, i in model["vocab"].items() if text not in gone}
    # A post-processor would only add tokens around the text, and may name removed ones.
    return {**data, "added_tokens": [], "post_processor": None, "model": model}


def _special_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """`eos_token` and so on -> text, from tokenizer_config.json (plain or as an object)."""
    texts = {}
    for name, value in config.items():
        if re.fullmatch(r"(bos|eos|pad|unk|sep|cls|mask)_token", name) and value is not None:
            texts[name] = value["content"] if isinstance(value, Mapping) else value
    return texts


def _extra_specials(config: Mapping[str, Any]) -> set[str]:
    """Further tokens that tokenizer_config.json declares special."""
    found = set()
    for name in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(name) or []
        for value in values.values() if isinstance(values, Mapping) else values:
            found.add(value["content"] if isinstance(value, Mapping) else value)
    return found


def _template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: its own file first, as in transformers, then the two older places."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if template is None:
        template = _optional_json(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{directory}: chat_template in tokenizer_config.json must be a text")
    return template


def _stop_ids(directory: Path, own: int | None) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        value = _optional_json(directory / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(
                f"{directory / name}: eos_token_id must be an id or a list of ids, is {value!r}"
            )
        return tuple(ids)
    if own is None:
        raise UserError(
            f"{directory}: nothing says where a response ends; add eos_token_id to "
            "generation_config.json"
        )
    return (own,)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
