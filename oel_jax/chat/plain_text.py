"""A `tokenizer.json` turned into one that reads every text as plain text.

Its vocabulary keeps all ids, but no text leads to a control token: not the list of added tokens,
not a whole word that the vocabulary has, not a merge. What is left of a prompt between its control
tokens then goes through the same normaliser, pre-tokeniser and model as in transformers.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from oel_jax.base.errors import UserError

Json = dict[str, Any]

_AS_WRITTEN = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)


def is_plain(token: Mapping[str, Any]) -> bool:
    """Whether an added token is an ordinary piece of text: blanks, as some vocabularies add them.

    Nothing in a chat is controlled by a run of blanks, and models have learnt text with them.
    """
    return not token["special"] and not token["content"].replace("\u2581", " ").strip()


def plain_tokenizers(data: Mapping[str, Any], added: Sequence[Mapping[str, Any]]) -> list[Json]:
    """The `tokenizer.json` for text that begins a sequence, and for text after a control token.

    There is one for both, where the first word of a sequence is not treated differently.

    Args:
        data: a whole tokenizer.json.
        added: its added tokens, with those of tokenizer_config.json.

    Raises:
        UserError: the tokenizer draws at random.
    """
    model = dict(data["model"])
    if model.get("dropout"):
        raise UserError(
            f"tokenizer.json has model.dropout {model['dropout']}: it splits words at random, for "
            "training; set it to null"
        )
    unknown = _unknown(model)
    gone = {token["content"] for token in added if not is_plain(token)} - unknown
    secret = secrets.token_hex(16)  # no text from outside can know it; ids do not depend on it
    names = {text: f"\ufffe{secret}{number}" for number, text in enumerate(sorted(gone))}
    model["vocab"] = _renamed(model.get("vocab"), names)
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _leads_to(merge, gone)]
    # They stay in the list, under other names, since the ids of those after them depend on it.
    hidden = [
        token | {"content": names[token["content"]]} | _AS_WRITTEN if token["content"] in names
        else token
        for token in added
        if token["content"] not in unknown
    ]  # fmt: skip
    # A post-processor would only add tokens around the text, and may name control tokens.
    first = {**data, "added_tokens": hidden, "post_processor": None, "model": model}
    first |= {"truncation": None, "padding": None}
    later = {**first, "pre_tokenizer": _not_first(data.get("pre_tokenizer"))}
    return [first] if later == first else [first, later]


def _unknown(model: Mapping[str, Any]) -> set[str]:
    """The unknown token, which the model itself refers to, and which controls nothing."""
    if isinstance(model.get("vocab"), list) and model.get("unk_id") is not None:
        return {model["vocab"][model["unk_id"]][0]}
    return {model.get("unk_token")} - {None}


def _renamed(vocab: Any, names: Mapping[str, str]) -> Any:
    """A vocabulary with other names for some tokens; ids and scores stay."""
    if isinstance(vocab, Mapping):
        return {names.get(text, text): i for text, i in vocab.items()}
    if isinstance(vocab, list):  # Unigram: [text, score] by id
        return [[names.get(text, text), score] for text, score in vocab]
    return vocab


def _leads_to(merge: str | Sequence[str], gone: set[str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return not gone.isdisjoint((left, right, left + right))


def _not_first(pre_tokenizer: Any) -> Any:
    """The pre-tokeniser without what it does only where the whole text begins."""
    if not isinstance(pre_tokenizer, Mapping):
        return pre_tokenizer
    changed = dict(pre_tokenizer)
    if changed.get("type") == "Metaspace" and changed.get("prepend_scheme") == "first":
        changed["prepend_scheme"] = "never"
    if isinstance(changed.get("pretokenizers"), list):
        changed["pretokenizers"] = [_not_first(one) for one in changed["pretokenizers"]]
    return changed


def kinds(data: Mapping[str, Any]) -> str:
    """What a tokenizer.json is made of, for messages: 'BPE, normaliser NFC, ...'."""

    def name(part: Any) -> str:
        if not isinstance(part, Mapping):
            return "none"
        inner = part.get("normalizers") or part.get("pretokenizers")
        return "+".join(map(name, inner)) if inner else str(part.get("type"))

    return (
        f"model {data['model'].get('type', 'of an unnamed type')}, normalizer "
        f"{name(data.get('normalizer'))}, pre_tokenizer {name(data.get('pre_tokenizer'))}"
    )
