"""What has been decided about the knowledge texts of a round: `review.json`. Imports no JAX.

schema   "oel.review/1"
round    from 1
texts    per chain:
    original   SHA-256 of the text that the extractor wrote; it stays in knowledge.json
    status     "waiting", "approved" or "rejected"
    edited     the text that is used in its place, or null
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.runs.workdir import Workdir

SCHEMA = "oel.review/1"
STATUSES = ("waiting", "approved", "rejected")


@dataclass
class Decision:
    """What has been decided about one text; the fields are those of the file."""

    original: str
    status: str = "waiting"
    edited: str | None = None


def written_texts(workdir: Workdir, round_number: int) -> list[str]:
    """The texts as they were extracted, chain by chain."""
    return read_json(workdir.knowledge(round_number))["texts"]


def load(workdir: Workdir, round_number: int) -> list[Decision]:
    """The decisions of a round, one for each text.

    A text that was extracted anew since it was decided on waits again.

    Raises:
      UserError: the file is damaged, or not of this version.
    """
    file, texts = workdir.review(round_number), written_texts(workdir, round_number)
    fresh = [Decision(_digest(text)) for text in texts]
    if not file.exists():
        return fresh
    try:
        stored = read_json(file)
        if stored["schema"] != SCHEMA:
            raise ValueError(f"schema {stored['schema']!r}")
        kept = [_decision(one) for one in stored["texts"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is no review of this version ({error}); delete it and decide again"
        ) from error
    kept += fresh[len(kept) :]
    return [
        old if old.original == new.original else new
        for old, new in zip(kept[: len(fresh)], fresh, strict=True)
    ]


def save(workdir: Workdir, round_number: int, decisions: list[Decision]) -> None:
    """Replace the file atomically."""
    texts = [asdict(decision) for decision in decisions]
    value = {"schema": SCHEMA, "round": round_number, "texts": texts}
    write_json(workdir.review(round_number), value)


def approved_texts(workdir: Workdir, round_number: int) -> list[tuple[int, str, bool]]:
    """(chain, text as it is to be used, whether it was edited) of each approved text."""
    pairs = enumerate(
        zip(written_texts(workdir, round_number), load(workdir, round_number), strict=True)
    )
    return [
        (chain, text if decision.edited is None else decision.edited, decision.edited is not None)
        for chain, (text, decision) in pairs
        if decision.status == "approved"
    ]


def _decision(value: dict[str, Any]) -> Decision:
    made = Decision(**value)
    edited = made.edited is None or isinstance(made.edited, str)
    if made.status not in STATUSES or not edited or not isinstance(made.original, str):
        raise ValueError(f"status {made.status!r}")
    return made


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
