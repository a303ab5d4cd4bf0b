"""What the files of a tokenizer say: added tokens, special tokens, chat templates, stop ids."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_object
from oel_jax.data import answers

# Tokens that survive decoding.
KEPT = (answers.OPEN, answers.CLOSE)


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens of the older file where it has no newer."""
    config = optional_object(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    return config | optional_object(directory / "special_tokens_map.json")


def added_tokens(
    directory: Path, data: Mapping[str, Any], config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Added tokens of all files, merged as in transformers: tokenizer_config.json comes first."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = set(special_texts(config).values()) | _extra_specials(config)
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
            for text, number in optional_object(directory / "added_tokens.json").items():
                late = {"content": text, "id": int(number), "normalized": text not in special}
                added.setdefault(text, flags | {"special": False} | late)
        vocab = data["model"].get("vocab")
        for text in sorted(special - added.keys()):  # named, and known to the model alone
            if isinstance(vocab, Mapping) and text in vocab:
                added[text] = flags | {"content": text, "id": vocab[text], "special": True}
        for text, token in added.items():
            token.pop("__type", None)
            token["special"] = (token["special"] or text in special) and text not in KEPT
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the added tokens of tokenizer.json or tokenizer_config.json are damaged ({error!r}); "
            "copy both files again"
        ) from error
    return sorted(added.values(), key=lambda token: token["id"])


def special_texts(config: Mapping[str, Any]) -> dict[str, str]:
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


def chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: their own file first, as in transformers, then older places."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return {"default": file.read_text(encoding="utf-8")}
    template = config.get("chat_template")
    if template is None:
        template = optional_object(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template}
    else:
        named = {"default": template}
    if named.get("default") is None:
        return {}
    if not all(isinstance(text, str) for text in named.values()):
        raise UserError(f"{directory}: chat_template in tokenizer_config.json must be a text")
    return named


def stop_ids(directory: Path, own: int | None) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        value = optional_object(directory / name).get("eos_token_id")
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


def optional_object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
