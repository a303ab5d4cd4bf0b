"""Lines of schema `oel.trajectory/1`, as runs wrote them before conversations, made schema 2.

There, a turn held the whole user message with the paper's wrapper around the situation, and for
demonstrations the knowledge in it. Here the situation is taken out again, so that an old line is
what this version would have written. Where that cannot be told for sure (another text around it, or
a knowledge text that itself quotes the wrapper), the message stays whole, without a wrapper.

The optimizer step of schema 1 is dropped: a trajectory does not know who will train on it.
"""

from collections.abc import Mapping
from typing import Any

from oel_jax.data import prompts

SCHEMA = "oel.trajectory/1"
_KEYS = "game seed policy round purpose chain step turns outcome".split()
_TURN_KEYS = "prompt prompt_ids response response_ids action observation".split()


class NotSchema1(ValueError):
    """The line does not follow schema 1."""


def upgrade(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record in the shape of schema 2; its values are checked there.

    Raises:
        NotSchema1: keys are missing or unknown, or what schema 2 would no longer see is wrong.
    """
    _check_keys(record, ["schema", *_KEYS], "the line")
    step = record["step"]
    if step is not None and (type(step) is not int or not 0 <= step < 2**31):
        raise NotSchema1(f"step must be an integer from 0 to {2**31 - 1} or null, got {step!r}")
    new = {key: record[key] for key in _KEYS if key not in ("chain", "step", "turns")}
    new["schema"] = "oel.trajectory/2"
    if record["chain"] is not None:
        new["chain"] = record["chain"]
    turns = record["turns"]
    if not isinstance(turns, list):
        return new | {"turns": turns}
    for t, turn in enumerate(turns):
        where = f"turns[{t}]"
        _check_keys(turn, _TURN_KEYS, where)
        if not isinstance(turn["prompt"], str) or not turn["prompt"]:
            raise NotSchema1(f"{where}.prompt must be a string that is not empty")
    found = _unwrap([turn["prompt"] for turn in turns])
    wrapper, knowledge, situations = found
    if wrapper:
        new["wrapper"] = wrapper
    if knowledge:
        new["context"] = {"kind": "knowledge", "text": knowledge, "place": "paper"}
    rest = [key for key in _TURN_KEYS if key != "prompt"]
    new["turns"] = [
        {"messages": [{"role": "user", "content": text}], **{key: turn[key] for key in rest}}
        for turn, text in zip(turns, situations, strict=True)
    ]
    return new


def _check_keys(record: Any, expected: list[str], where: str) -> None:
    if not isinstance(record, Mapping):
        raise NotSchema1(f"{where} must be a JSON object, got {str(record)[:60]!r}")
    for key in record:
        if key not in expected:
            score = any(word in key.lower() for word in ("reward", "score"))
            hint = "; trajectories carry no rewards and no scores" if score else ""
            raise NotSchema1(f"{where} has the unknown key {key[:60]!r}{hint}")
    for key in expected:
        if key not in record:
            raise NotSchema1(f"{where} lacks the key {key!r}")


def _unwrap(texts: list[str]) -> tuple[str, str, list[str]]:
    """(wrapper, knowledge, situations) that the prompts were made of; ('', '', texts) if unsure."""
    for wrapper, (head, told) in prompts.WRAPPERS.items():
        before, between = told.split("{experience}")
        for knowledge in ["", *_between(texts, before, between)]:
            start = before + knowledge + between if knowledge else head
            end = prompts.TAIL
            if all(t.startswith(start) and t.endswith(end) for t in texts) and all(
                len(t) >= len(start) + len(end) for t in texts
            ):
                return wrapper, knowledge, [t[len(start) : len(t) - len(end)] for t in texts]
    return "", "", texts


def _between(texts: list[str], before: str, between: str) -> list[str]:
    """The one knowledge text that the first prompt can hold, or none."""
    if not texts or not texts[0].startswith(before) or texts[0].count(between) != 1:
        return []
    return [texts[0][len(before) : texts[0].index(between)]]
