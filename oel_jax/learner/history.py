"""Thought markers in the games that an extractor reads: as plain characters, or as tokens.

Here text from outside never becomes a control token, so `<think>` in a game's history is seven
characters to the extractor. The released code tokenises the filled template as a whole, so that the
player's `<think>` and `</think>` become tokens again (`extract.history_markers='tokens'`). With it
exactly those markers are tokens that the player sampled as tokens. One that a board, a knowledge
text or the player spells out stays text, and so does every other control token.
"""

import re
from collections.abc import Callable, Sequence

from oel_jax.chat.tokenizer import Tokenizer
from oel_jax.data.answers import CLOSE, OPEN
from oel_jax.data.trajectories import Trajectory

# A character that Unicode reserves for use inside programs. Text may hold it all the same.
_MARK = "\uffff"


def with_markers(
    compose: Callable[[list[tuple[str, str]]], str],
    game: Trajectory,
    wrote: Tokenizer,
    reads: Tokenizer,
) -> list[str | int]:
    """The extractor's message in pieces: plain text, and ids of the markers that are genuine.

    Args:
        compose: makes the message from (observation, response) of every turn.
        game: its turns must have ids.
        wrote: the player's tokenizer, for `Turn.response_ids`.
        reads: the extractor's; a marker that it does not have stays text.
    """
    known = {token.text: i for i, token in reads.control.items() if token.text in (OPEN, CLOSE)}
    exchanges = game.exchanges()
    plain = compose(exchanges)
    # Longer than any run of it in the message: no text can pass for a stand-in.
    mark = _MARK * (1 + max(map(len, re.findall(f"{_MARK}+", plain)), default=0))
    stand_ins = {text: f"{mark}{i}{mark}" for text, i in known.items()}
    responses = [
        "".join(
            stand_ins.get(piece, piece) if number % 2 else piece
            for number, piece in enumerate(pieces(turn.response, turn.response_ids, wrote))
        )
        for turn in game.turns
    ]
    message = compose(
        [(said, marked) for (said, _), marked in zip(exchanges, responses, strict=True)]
    )
    found = re.split(f"{mark}([0-9]+){mark}", message)
    return [int(piece) if number % 2 else piece for number, piece in enumerate(found)]


def pieces(response: str, ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """A response cut at the markers that were sampled as tokens: text, marker, text, ..., text.

    Args:
        response: `ids`, decoded by `tokenizer`.
    """
    markers = {i: t.text for i, t in tokenizer.control.items() if t.text in (OPEN, CLOSE)}
    found, end = [], 0
    for index, i in enumerate(ids):
        if i not in markers:
            continue
        start = len(tokenizer.decode(ids[:index]))
        if start >= end and response.startswith(markers[i], start):
            found += [response[end:start], markers[i]]
            end = start + len(markers[i])
    return [*found, response[end:]]
