"""Does a tokenizer fit the model it is to be used with? Asked before weights are read.

Token ids are stated by the tokenizer, config.json and generation_config.json; rows of the embedding
by config.json and the weights (see `weight_files`). A missing row would be read as the last one.

More rows than tokens are usual (Qwen3: 151,936 and 151,669); the spare rows are never sampled. The
stop ids of generation_config.json win over those of config.json, as in transformers.
"""

import datetime
from pathlib import Path

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_object
from oel_jax.chat.tokenizer import Tokenizer, load_tokenizer
from oel_jax.models.config import ModelConfig

_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


def fitting_tokenizer(
    directory: Path, cfg: ModelConfig, today: datetime.datetime | None = None
) -> Tokenizer:
    """The tokenizer of a model directory, checked against the model; `today` as `load_tokenizer`.

    Raises:
        UserError: as `load_tokenizer`; or an id of a stop, of the chat template or of plain text
            has no row in the embedding, or no token.
    """
    check_ids(directory, cfg)
    tokenizer = load_tokenizer(directory, today)
    _check_stops(directory, tokenizer)
    if tokenizer.vocab_size > cfg.vocab_size:
        _check_text(directory, cfg, tokenizer)
        _check_template(directory, cfg, tokenizer)
    return tokenizer


def check_ids(directory: Path, cfg: ModelConfig) -> None:
    """Stop, begin and padding ids of the two config files must have rows (-1 means none).

    Raises:
        UserError: one has none, naming file, id and rows.
    """
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        values = read_object(file) if file.is_file() else {}
        for field in _IDS:
            value = values.get(field)
            for i in value if isinstance(value, list) else [value]:
                if type(i) is int and i >= cfg.vocab_size:
                    raise UserError(
                        f"{file}: {field} is {i}, but vocab_size in config.json gives the model "
                        f"only ids below {cfg.vocab_size}; take the file from the original model, "
                        "or correct the id"
                    )


def _check_stops(directory: Path, tokenizer: Tokenizer) -> None:
    for i in tokenizer.stop_ids:
        if i >= tokenizer.vocab_size:
            raise UserError(
                f"{directory}: the stop id {i} (eos_token_id) is no token of the tokenizer, which "
                f"has ids below {tokenizer.vocab_size}, so no answer could end; correct "
                "eos_token_id, or take the tokenizer files from the original model"
            )


def _check_text(directory: Path, cfg: ModelConfig, tokenizer: Tokenizer) -> None:
    """Ids beyond the embedding may only be control tokens, which text cannot make, or gaps."""
    for i in range(cfg.vocab_size, tokenizer.vocab_size):
        if i not in tokenizer.control and tokenizer.decode([i]):
            raise _no_row(directory, cfg, tokenizer, i, "text can contain")


def _check_template(directory: Path, cfg: ModelConfig, tokenizer: Tokenizer) -> None:
    for thinking in (True, False):
        try:
            ids = tokenizer.chat("", thinking=thinking)
        except UserError:
            return  # no usable template; whoever needs it says so
        for i in ids:
            if i >= cfg.vocab_size:
                raise _no_row(directory, cfg, tokenizer, i, "the chat template contains")


def _no_row(
    directory: Path, cfg: ModelConfig, tokenizer: Tokenizer, i: int, where: str
) -> UserError:
    text = tokenizer.control[i].text if i in tokenizer.control else tokenizer.decode([i])
    return UserError(
        f"{directory}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but vocab_size in "
        f"config.json gives the embedding only {cfg.vocab_size} rows; {where} the token {i} "
        f"({text!r}), which has none. Take tokenizer and weights from one model; if tokens were "
        f"added, resize the embedding to {tokenizer.vocab_size} rows and save the model again"
    )
