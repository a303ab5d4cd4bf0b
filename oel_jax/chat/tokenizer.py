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
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oel_jax.chat import template
from oel_jax.chat.control_tokens import ControlToken, Part
from oel_jax.chat.plain_text import is_plain, kinds, plain_tokenizers
from oel_jax.data import answers
from oel_jax.errors import UserError
from oel_jax.files import read_object

_KEPT = (answers.OPEN, answers.CLOSE)
# What both ways of making ids are compared on: blanks at the ends and inside, digits, scripts.
_PROBES = (
    "You play a game. Go up or down: [up]",
    "  two  blanks \n\n and lines\n",
    "\tNo. 1234, it's 56!\n ",
    " Äé e\u0301 √ 中文 한 \U0001f600 ﬁ ½\u3000",
    "x",
)


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
        self._specials = _special_texts(config)
        self._template = _template(directory, config)
        self._prompts: dict[bool, template.Prompt] = {}
        ids = {token.text: token.id for token in control}
        self.stop_ids = _stop_ids(directory, ids.get(self._specials.get("eos_token", "")))
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
        if not isinstance(message, str):
            message = [part if isinstance(part, str) else self.control[part] for part in message]
        return self._prompt(thinking).fill(message)

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
        return self._prompt(thinking).opens_thought

    def _prompt(self, thinking: bool) -> template.Prompt:
        """The template rendered with this flag; made and checked when it is first asked for."""
        if self._template is None:
            raise UserError(
                f"{self._directory} has no chat template: add chat_template.jinja, or the field "
                "chat_template in tokenizer_config.json, from the original model"
            )
        if thinking not in self._prompts:
            try:
                prompt = template.prompt(
                    self._template,
                    self.control.values(),
                    self._specials,
                    thinking=thinking,
                    today=self._today,
                )
                self._check(prompt)
            except UserError as error:
                raise UserError(f"{self._directory}: {error}") from error
            self._prompts[thinking] = prompt
        return self._prompts[thinking]

    def _check(self, prompt: template.Prompt) -> None:
        """UserError if prompts would have other ids than in transformers."""
        known = {token.text for token in self.control.values()}
        for name, text in self._specials.items():
            if text and text not in known and text in prompt.before + prompt.after:
                raise UserError(
                    f"the chat template shows {text!r}, the {name} of tokenizer_config.json, which "
                    "the tokenizer does not have; take all files from one model"
                )


class HuggingFaceTokenizer(Tokenizer):
    """`tokenizer.json` through the `tokenizers` library, without torch or transformers."""

    def __init__(self, directory: Path, today: datetime.datetime | None = None):
        import tokenizers  # a second of loading that a SentencePiece model does not need

        config = _config(directory)
        data = read_object(directory / "tokenizer.json")
        if not isinstance(data.get("model"), dict):
            raise UserError(f"{directory / 'tokenizer.json'} has no model; copy it again")
        added = _added_tokens(directory, data, config)
        data |= {"truncation": None, "padding": None, "added_tokens": added}
        try:
            plain = plain_tokenizers(data, added)
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(data))
            self._plain = [tokenizers.Tokenizer.from_str(json.dumps(one)) for one in plain]
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
        plain = self._plain[0 if first else -1]
        ids = plain.encode(text, add_special_tokens=False).ids
        if not self._never.isdisjoint(ids):
            unsafe = next(i for i in ids if i in self._never)
            raise UserError(
                f"{self._directory}: plain text produces the added token "
                f"{self.control[unsafe].text!r}; this kind of tokenizer.json is not supported"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._clean_up(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def _check(self, prompt: template.Prompt) -> None:
        super()._check(prompt)
        texts = [token.text for token in self.control.values()]
        for probe in _PROBES:
            if any(text in probe for text in texts):  # there the ids are meant to differ
                continue
            ids = self.encode_parts(prompt.fill(probe))
            if ids != self._backend.encode(prompt.shown(probe), add_special_tokens=False).ids:
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
            ControlToken(i, piece, special=piece not in _KEPT)
            for i, piece in enumerate(pieces)
            if self._model.IsControl(i)
        ]
        config = _config(directory)
        self._refuse_unlike(path, config)
        super().__init__(directory, config, control, today)
        named = {pieces[i] for i in (*self.stop_ids, self.pad_id) if i < self.vocab_size}
        loose = sorted((named | set(_KEPT) & set(pieces)) - {token.text for token in control})
        if loose:
            raise UserError(
                f"{path}: {', '.join(loose)} must be control_symbols, or plain text could make them"
            )

    def _refuse_unlike(self, path: Path, config: Mapping[str, Any]) -> None:
        """UserError for what transformers reads from elsewhere, or not as SentencePiece does."""
        pieces = {self._model.IdToPiece(i) for i in range(self.vocab_size)}
        added = [token["content"] for token in (config.get("added_tokens_decoder") or {}).values()]
        added += _optional_json(path.with_name("added_tokens.json"))
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


_FLAGS = ("id", "special", "lstrip", "rstrip", "single_word", "normalized")


def _config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens of the older file where it has no newer."""
    config = _optional_json(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    return config | _optional_json(directory / "special_tokens_map.json")


def _added_tokens(
    directory: Path, data: Mapping[str, Any], config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Added tokens of all files, merged as in transformers: tokenizer_config.json comes first."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = set(_special_texts(config).values()) | _extra_specials(config)
    try:
        added = {
            t["content"]: flags | {"special": False} | t for t in data.get("added_tokens") or []
        }
        for key, token in (config.get("added_tokens_decoder") or {}).items():
            merged = flags | {"special": False} | token | {"id": int(key)}
            known = added.get(token["content"])
            if known and known["id"] != merged["id"]:
                raise UserError(
                    f"{directory}: tokenizer.json and tokenizer_config.json disagree about the id "
                    f"of {token['content']!r}; take both files from one model"
                )
            added[token["content"]] = merged
        if "added_tokens_decoder" not in config:
            for text, number in _optional_json(directory / "added_tokens.json").items():
                late = {"content": text, "id": int(number), "normalized": text not in special}
                added.setdefault(text, flags | {"special": False} | late)
        vocab = data["model"].get("vocab")
        for text in sorted(special - added.keys()):  # named, and known to the model alone
            if isinstance(vocab, Mapping) and text in vocab:
                added[text] = flags | {"content": text, "id": vocab[text], "special": True}
        for text, token in added.items():
            token.pop("__type", None)
            token["special"] = (token["special"] or text in special) and text not in _KEPT
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the added tokens of tokenizer.json or tokenizer_config.json are damaged ({error!r}); "
            "copy both files again"
        ) from error
    return sorted(added.values(), key=lambda token: token["id"])


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
    return read_object(path) if path.is_file() else {}
