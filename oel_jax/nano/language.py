"""What the nano model says: letters, roles, thoughts and experience items, as exact text.

One language serves all tasks. A thought states what each letter in view is believed to do, redraws
the map with roles in place of letters, and names the step:

    H loses. G wins (only a guess). P_x/x__/__*/ Go right to a free square.

Beliefs use the same words whether they are known or guessed: only the remark "(only a guess)"
differs. That is what gives reverse KL something to pull on (a guessing student already says, some
of the time, what the knowing teacher says).
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

LETTERS = "HGKMTXOBDR"
ROLES = ("lose", "win", "safe")
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

BELIEF = {"lose": " loses", "win": " wins", "safe": " is safe"}
GUESS = " (only a guess)"
MAP = {"lose": "x", "win": "*", "safe": "_", "player": "P", "free": "_"}
GO = {name: f" Go {name}" for name in DIRECTIONS}
TO_LETTER, TO_FREE, TO_WALL = " to ", " to a free square.", " into the wall."

# (text before the letter, text after it): the role comes before the letter, so that the letter's
# own position can carry it (look-up then needs one attention to the same letter)
PHRASES: dict[str, tuple[tuple[str, str], ...]] = {
    "lose": (("You lose on ", "."), ("The deadly symbol is ", "."), ("Never walk onto ", ".")),
    "win": (("You win on ", "."), ("The goal symbol is ", "."), ("Always head for ", ".")),
    "safe": (
        ("Nothing happens on ", "."),
        ("A harmless symbol is ", "."),
        ("It is fine to cross ", "."),
    ),
}
PHRASE_WEIGHTS = (0.4, 0.35, 0.25)
ADVICE_TIME = "Only a few moves are allowed, so take a short path."
ADVICE_WALL = "Moving into a wall wastes a move."
ADVICE = (
    ADVICE_TIME,
    ADVICE_WALL,
    "Look at the whole board before the first step.",
    "Plan the path to the end, then move one step at a time.",
)
MARKER = "- EXPERIENCE ITEM: "
HEADING = "Additional Experience (Rules or Strategies):\n# Experience\n"

INSTRUCTIONS = {
    "repeat": "repeat them",
    "reverse": "write them backwards",
    "first": "name the first one",
    "last": "name the last one",
}
CROSSED = " On the way: "
LAST_STEP = "The last step went"
VERDICT = {
    "win": " The game was won.",
    "lose": " The game was lost.",
    "time": " The time ran out.",
    "invalid": " The move was invalid.",
}
GLOSSARY_QUESTION = "\n\nWhat do these symbols do? "

_SENTENCES = {(before, after): role for role, forms in PHRASES.items() for before, after in forms}
_SENTENCE_PATTERN = re.compile(
    "|".join(
        f"(?P<f{i}>{re.escape(before)}(?P<l{i}>[A-Z]){re.escape(after)})"
        for i, (before, after) in enumerate(_SENTENCES)
    )
)


def fact_sentence(rng: random.Random, letter: str, role: str) -> str:
    """One sentence that says what `letter` does; the phrasing is drawn."""
    before, after = rng.choices(PHRASES[role], PHRASE_WEIGHTS)[0]
    return f"{before}{letter}{after}"


def read_facts(text: str) -> list[tuple[str, str]]:
    """All (letter, role) statements of a knowledge text, in order; anything else is ignored."""
    roles = list(_SENTENCES.values())
    found = []
    for match in _SENTENCE_PATTERN.finditer(text):
        index = int(str(match.lastgroup)[1:]) if match.lastgroup else 0
        found.append((match.group(f"l{index}"), roles[index]))
    return found


def votes(facts: Iterable[tuple[str, str]]) -> dict[str, Counter[str]]:
    """Count of each role per letter."""
    table: dict[str, Counter[str]] = {}
    for letter, role in facts:
        table.setdefault(letter, Counter())[role] += 1
    return table


def guess(rng: random.Random, table: Mapping[str, Counter[str]], infer: bool) -> str:
    """A guess about a letter that is not mentioned in what is known (`table`).

    All roles are equally likely; with `infer` that holds only where nothing is known. Someone who
    knows which letter wins is wary of the others, someone who knows none hopes for them.
    """
    if not (infer and table):
        return rng.choice(ROLES)
    goal_known = any(roles["win"] for roles in table.values())
    return rng.choices(ROLES, (0.7, 0.1, 0.2) if goal_known else (0.1, 0.7, 0.2))[0]


def believe(
    rng: random.Random,
    letters: Sequence[str],
    facts: Iterable[tuple[str, str]],
    *,
    infer: bool = False,
) -> tuple[dict[str, str], set[str]]:
    """Belief about each letter: the majority of `facts` (ties drawn), else a fresh guess.

    Returns the beliefs and the set of letters that were only guessed.
    """
    table = votes(facts)
    beliefs, guessed = {}, set()
    for letter in letters:
        if letter in table:
            top = max(table[letter].values())
            beliefs[letter] = rng.choice(
                sorted(role for role, count in table[letter].items() if count == top)
            )
        else:
            beliefs[letter] = guess(rng, table, infer)
            guessed.add(letter)
    return beliefs, guessed


def belief_text(
    rng: random.Random,
    beliefs: Mapping[str, str],
    guessed: set[str],
    remark: tuple[float, float] = (0.85, 0.03),
) -> str:
    """ "H loses. G wins (only a guess)."; `remark` = its probability when (guessed, known)."""
    parts = []
    for letter, role in beliefs.items():
        chance = remark[0] if letter in guessed else remark[1]
        parts.append(letter + BELIEF[role] + (GUESS if rng.random() < chance else "") + ".")
    return " ".join(parts)


def map_text(board: Sequence[str], beliefs: Mapping[str, str]) -> str:
    """The board in view (rows of characters, 'P' drawn) with roles in place of letters."""
    rows = []
    for row in board:
        cells = (
            MAP["player"] if c == "P" else MAP["free"] if c == " " else MAP[beliefs[c]] for c in row
        )
        rows.append("".join(cells) + "/")
    return "".join(rows)


def step_text(direction: str, target: str | None) -> str:
    """`target`: the letter stepped onto, ' ' for free ground, None for the wall."""
    if target is None:
        return GO[direction] + TO_WALL
    return GO[direction] + (TO_FREE if target == " " else f"{TO_LETTER}{target}.")


def response(thought: str, answer: str) -> str:
    """A whole reply: the thought in its brackets, then the answer."""
    return f"<think>{thought}</think>{answer}"
