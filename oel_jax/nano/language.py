"""What the nano models say: symbols, roles, thoughts and experience items, as exact text.

One language serves both games and all tasks. A thought states what each symbol in view is believed
to do, redraws the map with roles in place of symbols, and names the step:

    H loses. G wins (only a guess). P_x/x__/__*/ Go right to a free square.

Beliefs use the same words whether they are known or guessed: only the remark "(only a guess)"
differs. This gives reverse KL something to pull on (a guessing student already says, some
of the time, what the knowing teacher says).
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

SYMBOLS = "HGKMTXOBD#"
LAKE_ROLES = ("lose", "win", "safe")
ROOM_ROLES = ("wall", "box", "target")
ROLES = LAKE_ROLES + ROOM_ROLES
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

BELIEF = {
    "lose": " loses",
    "win": " wins",
    "safe": " idles",
    "wall": " blocks",
    "box": " moves",
    "target": " scores",
}
GUESS = " (only a guess)"
MAP = {
    "lose": "x",
    "win": "*",
    "safe": "_",
    "wall": "x",
    "box": "o",
    "target": "*",
    "player": "P",
    "free": "_",
}
GO = {name: f" Go {name}" for name in DIRECTIONS}
TO, TO_FREE, TO_WALL = " to ", " to a free square", " into the wall"
PLAN = (" Player ", ", box ", ", target ", "; push ", " from ", ".")
BEFORE, BEFORE_FREE = " before ", " before a free square"

# What an item says of a symbol; the symbol comes first, then words. Three phrasings of each fact.
PHRASES: dict[str, tuple[str, str, str]] = {
    "lose": (" loses the game.", " is deadly.", " must be avoided."),
    "win": (" wins the game.", " is the goal.", " must be reached."),
    "safe": (" does nothing.", " is harmless.", " can be crossed."),
    "wall": (" blocks the way.", " is a wall.", " stops every move."),
    "box": (" moves when pushed.", " is the box.", " can be pushed."),
    "target": (" scores with the box.", " is the target.", " must hold the box."),
}
ADVICE_TIME = "Only a few moves are allowed, so take a short path."
ADVICE_WALL = "Moving into a wall wastes a move."
ADVICE = (
    ADVICE_TIME,
    ADVICE_WALL,
    "Look at the whole board before the first step.",
    "Plan the path to the end, then move one step at a time.",
)
NOTHING_NEW = "Nothing new: the experience above holds."
MARKER = "- EXPERIENCE ITEM: "
HEADING = "Additional Experience (Rules or Strategies):\n# Experience\n"

INSTRUCTIONS = {
    "repeat": "repeat them",
    "reverse": "write them backwards",
    "first": "name the first one",
    "last": "name the last one",
}
CROSSED, PUSHED, BLOCKED = " On the way: ", " Pushed: ", " Blocked by: "
LAST_STEP = "The last step went"
VERDICT = {
    "win": " The game was won.",
    "lose": " The game was lost.",
    "time": " The time ran out.",
    "invalid": " The move was invalid.",
}
GLOSSARY_QUESTION = "\n\nWhat do these symbols do? "

_PHRASE_ROLE = {phrase: role for role, phrases in PHRASES.items() for phrase in phrases}
_FACT = re.compile(f"([{re.escape(SYMBOLS)}A-Z])({'|'.join(re.escape(p) for p in _PHRASE_ROLE)})")


def statements(symbol: str, role: str) -> list[str]:
    """Every phrasing of one fact."""
    return [symbol + phrase for phrase in PHRASES[role]]


def fact_sentence(rng: random.Random, symbol: str, role: str, known: str = "") -> str | None:
    """One sentence that says what `symbol` does, drawn among the phrasings that `known` lacks.

    Returns None when `known` holds them all.
    """
    new = [line for line in statements(symbol, role) if line not in known]
    return rng.choice(new) if new else None


def read_facts(text: str) -> list[tuple[str, str]]:
    """All (symbol, role) statements of a knowledge text, in order; anything else is ignored."""
    return [(m.group(1), _PHRASE_ROLE[m.group(2)]) for m in _FACT.finditer(text)]


def votes(facts: Iterable[tuple[str, str]], roles: Sequence[str]) -> dict[str, Counter[str]]:
    """Count of each of `roles` per symbol; statements about other roles (games) are left out."""
    table: dict[str, Counter[str]] = {}
    for symbol, role in facts:
        if role in roles:
            table.setdefault(symbol, Counter())[role] += 1
    return table


def majority(rng: random.Random, counts: Counter[str]) -> str:
    """The most frequent role; ties are drawn."""
    top = max(counts.values())
    return rng.choice(sorted(role for role, count in counts.items() if count == top))


def belief_text(
    rng: random.Random,
    beliefs: Mapping[str, str],
    guessed: set[str],
    remark: tuple[float, float] = (0.85, 0.03),
) -> str:
    """ "H loses. G wins (only a guess)."; `remark` = its probability when (guessed, known)."""
    parts = []
    for symbol, role in beliefs.items():
        chance = remark[0] if symbol in guessed else remark[1]
        parts.append(symbol + BELIEF[role] + (GUESS if rng.random() < chance else "") + ".")
    return " ".join(parts)


def map_text(board: Sequence[str], beliefs: Mapping[str, str]) -> str:
    """The board in view (rows of characters) with roles in place of symbols.

    'P' is the player; blanks and '_' are free ground.
    """
    rows = []
    for row in board:
        cells = (
            MAP["player"] if c == "P" else MAP["free"] if c in " _" else MAP[beliefs[c]]
            for c in row
        )
        rows.append("".join(cells) + "/")
    return "".join(rows)


def step_text(direction: str, ahead: str | None, beyond: str | None = None) -> str:
    """ " Go right to X before O." from what is ahead and, where it matters, after that.

    A blank or '_' is free ground, None is outside the board.
    """
    return GO[direction] + reach_text(ahead, beyond)


def reach_text(ahead: str | None, beyond: str | None = None) -> str:
    """The second half of `step_text`: " to X before O."."""
    if ahead is None:
        return TO_WALL + "."
    if ahead in " _":
        return TO_FREE + "."
    if beyond is None:
        return f"{TO}{ahead}."
    return f"{TO}{ahead}" + (BEFORE_FREE if beyond in " _" else f"{BEFORE}{beyond}") + "."


def response(thought: str, answer: str) -> str:
    """A whole reply: the thought in its brackets, then the answer."""
    return f"<think>{thought}</think>{answer}"
