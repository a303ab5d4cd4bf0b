"""Runs that are broken on purpose: an instrument that cannot show failure shows nothing.

`config.negative_control` cuts one link of the method and leaves the rest as it is. The pass rate
must then not rise; if it does, it was not the method that raised it.

    shuffled_knowledge         the round's texts tell of another world: the same facts about other
                               symbols, for the teacher and for the evaluation in context
    teacher_without_knowledge  the teacher reads the student's own prompt
    foreign_extraction         knowledge is drawn from another game, played by the same policy
    foreign_top_k              the loss compares tokens half a vocabulary away from the likeliest

Everything that is broken is broken here; each stage calls one function, which gives back what it
got when no control is set. Nothing is imported at the top that loads JAX or a game: the checks of
the config read this module first, and so does the server side.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

CONTROLS = (
    "shuffled_knowledge",
    "teacher_without_knowledge",
    "foreign_extraction",
    "foreign_top_k",
)
OTHER_GAME = {"frozen_lake": "sokoban", "sokoban": "frozen_lake"}

# One-character symbols a text may be about. 'A' and 'I' are missing: on no board, but English.
# The first five on boards are given spare letters, which the nano model knows and no board shows.
_ON_BOARDS = "HGXO#P_√"
_SPARE = "KMTBD"
_RARE = "CEFJLNQRSUVWYZ"
_SYMBOL = re.compile(rf"(?<![\w#√])[{_ON_BOARDS}{_SPARE}{_RARE}](?![\w#√])")


def announcement(config: Any) -> str:
    """One line, with its end, that nobody can overlook; '' for a run without a control."""
    name = config.negative_control
    if name == "none":
        return ""
    return f"!!! negative control {name!r}: this run is broken on purpose !!!\n"


def mark(config: Any) -> dict[str, str]:
    """What the summary says about it: nothing, or the name of the control."""
    name = config.negative_control
    return {} if name == "none" else {"negative_control": name}


def renamed_symbols(seed: int, round_number: int) -> dict[str, str]:
    """What every symbol is called in the other world of a round: a permutation that keeps none.

    The symbols stand in a ring, boards' symbols first, then spare and rare letters in random order,
    and each takes the name of the one eight places on. So what a board shows gets a name that no
    board shows: a fact about H can land neither on H nor on G. Only letters that a text has no
    reason to speak of come to stand for symbols on boards.
    """
    rng = random.Random(f"negative control {seed} {round_number}")
    spare, rare = (rng.sample(letters, len(letters)) for letters in (_SPARE, _RARE))
    ring = [*_ON_BOARDS, *spare, *rare]
    step = len(_ON_BOARDS)
    return {name: ring[(i + step) % len(ring)] for i, name in enumerate(ring)}


def knowledge_texts(config: Any, round_number: int, texts: Sequence[str]) -> list[str]:
    """The round's texts as teacher and evaluation read them ('shuffled_knowledge').

    A symbol is renamed where it is alone, as in 'H is deadly' or '(#)'; all else stays byte for
    byte. Words that give a symbol away ('hole' for H) stay too, so with a model that writes such
    words this control is a weaker one.
    """
    if config.negative_control != "shuffled_knowledge":
        return list(texts)
    names = renamed_symbols(config.seed, round_number)
    return [_SYMBOL.sub(lambda match: names[match[0]], text) for text in texts]


def teacher_texts(config: Any, round_number: int, texts: Sequence[str]) -> list[str]:
    """The round's texts as the teacher alone reads them ('teacher_without_knowledge': none)."""
    if config.negative_control == "teacher_without_knowledge":
        return [""] * len(texts)
    return knowledge_texts(config, round_number, texts)


def played_game(config: Any, purpose: str) -> str:
    """The game that is deployed for a purpose, 'extract' or 'deploy' ('foreign_extraction')."""
    if config.negative_control == "foreign_extraction" and purpose == "extract":
        return OTHER_GAME[config.game.name]
    return config.game.name
