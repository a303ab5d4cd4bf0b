"""What a nano model is asked for its card, and how its replies are judged.

Nothing here runs a model: worlds and prompts come out, replies go in.
"""

import dataclasses
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from oel_jax.data import answers, knowledge
from oel_jax.environments import NO_ACTION
from oel_jax.nano import examples
from oel_jax.nano import language as lang
from oel_jax.nano.lake import World
from oel_jax.nano.players import AnyWorld, Facts, Game, begin, draw, play_out
from oel_jax.nano.room import SIZE, RoomWorld

# What the symbols of the real games do.
REAL: dict[str, dict[str, str]] = {
    "frozen_lake": {"H": "lose", "G": "win"},
    "sokoban": {"#": "wall", "X": "box", "O": "target"},
}
SWAPPED = {"H": "win", "G": "lose"}


# --- worlds


def real_world(name: str, board: str) -> AnyWorld:
    """The real game's board (its `board_id`) as a nano world, which speaks as the game does."""
    rows = board.split("/")
    if name == "frozen_lake":
        return World(tuple(row.replace("P", " ") for row in rows), (0, 0), dict(REAL[name]))
    at = {symbol: (r, c) for r, row in enumerate(rows) for c, symbol in enumerate(row)}
    inner = range(1, SIZE - 1)
    walls = frozenset((r, c) for r in inner for c in inner if rows[r][c] == "#")
    # A target under the player is not drawn.
    return RoomWorld(walls, at["P"], at["X"], at.get("O", at["P"]), dict(REAL[name]))


def swapped_world(board: str) -> AnyWorld:
    """A real Frozen Lake board on which H wins and G loses."""
    return dataclasses.replace(real_world("frozen_lake", board), roles=dict(SWAPPED))


def winnable(world: AnyWorld) -> bool:
    """Whether the scripted player, told everything, wins within the turn limit.

    It takes a shortest way, so this says whether anyone could.
    """
    facts = list(world.roles.items())
    game, _ = play_out(random.Random(0), world, facts, clumsy=0.0, thinking=False)
    return game.result == "win"


def other_worlds(rng: random.Random, name: str) -> Iterator[AnyWorld]:
    """Worlds of the training distribution that can be won within the turn limit, without end."""
    while True:
        world = draw(rng, name)
        if winnable(world):
            yield world


# --- knowledge


def told(rng: random.Random, facts: Facts) -> str:
    """A v4 text that states each fact once, in drawn words and order."""
    items = [lang.fact_sentence(rng, *fact) or "" for fact in facts]
    rng.shuffle(items)
    return examples.knowledge_text(items, "v4")


def told_at_length(rng: random.Random, facts: Facts) -> str:
    """A v4 text of 8 to 16 items: each fact at least once, repeated unevenly, a fifth advice."""
    extra = rng.randint(8, 16) - len(facts)
    weights = [0.05 + rng.random() for _ in facts]
    items = [lang.fact_sentence(rng, *fact) or "" for fact in facts]
    for fact in rng.choices(list(facts), weights, k=extra):
        advice = rng.random() < 0.2
        items.append(rng.choice(lang.ADVICE) if advice else lang.fact_sentence(rng, *fact) or "")
    rng.shuffle(items)
    return examples.knowledge_text(items, "v4")


def previous_text(rng: random.Random, world: AnyWorld, version: str) -> str:
    """Earlier knowledge for the extractor, as in training: parts of the truth, noise, advice."""
    items: list[str] = []
    while not items:
        items = examples.draw_knowledge(rng, world, whole=0.4)
    return examples.knowledge_text(items, version)


# --- what a game shows, and what was made of it


def replay(world: AnyWorld, actions: Sequence[str]) -> Game:
    """The nano game of the same board after the same actions ('[up]').

    Replies without an action are left out: they move nothing and touch nothing, so what the game
    shows (`evidence`) is the same. Its result is that of the real game unless such a reply ended
    it.
    """
    game = begin(world)
    for action in actions:
        if action != NO_ACTION:
            game.step(action[1:-1])
    return game


class Verdict(NamedTuple):
    """Of an extractor's reply.

    Attributes:
      right: the thought was finished, no fact is false, and after a win or a loss at least one
        fact is stated that the game showed (or there was none left to state).
      repeats: an item is word for word in the previous knowledge.
    """

    right: bool
    repeats: bool


def judge_extraction(
    reply: str,
    version: str,
    roles: Mapping[str, str],
    shown: Facts,
    *,
    decided: bool,
    previous: str = "",
) -> Verdict:
    """Judge what the loop would keep of a reply.

    Args:
      version: 'v3' or 'v4', as the reply is to be parsed.
      roles: the truth; a fact about any other symbol is false.
      shown: what the game shows.
      decided: it was won or lost. Then a fact it shows must be stated, unless `previous` says all
        of them already, in whatever words: the prompt asks not to repeat what is known.
    """
    answer, finished = answers.split_thought(reply, opened=False)
    if not finished:
        return Verdict(False, False)
    parsed = knowledge.parse(answer or "", version)
    facts = lang.read_facts(parsed)
    true = all(roles.get(symbol) == role for symbol, role in facts)
    known = set(shown) <= set(lang.read_facts(previous))
    enough = not decided or known or not set(shown).isdisjoint(facts)
    return Verdict(true and enough, not _lines(parsed).isdisjoint(_lines(previous)))


def _lines(text: str) -> set[str]:
    """The items of a knowledge text without marker; blank lines are none."""
    lines = (line.strip().removeprefix(knowledge.MARKER).strip() for line in text.split("\n"))
    return {line for line in lines if line}


# --- other tasks

_STATED = {words: role for role, words in lang.BELIEF.items()}
_BELIEF = re.compile(
    f"([{re.escape(lang.SYMBOLS)}])({'|'.join(map(re.escape, _STATED))})"
    f"(?:{re.escape(lang.GUESS)})?\\."
)


def beliefs(text: str) -> dict[str, set[str]]:
    """Every role that a text (a thought) states for each symbol; "(only a guess)" counts too."""
    found: dict[str, set[str]] = {}
    for symbol, words in _BELIEF.findall(text):
        found.setdefault(symbol, set()).add(_STATED[words])
    return found


def look_up_answer(prompt: str) -> dict[str, str]:
    """The known answer of a glossary prompt: for each symbol asked for, the role most items state.

    Symbols without items, or with a tie, are left out.
    """
    text, _, asked = prompt.partition(lang.GLOSSARY_QUESTION)
    table = lang.votes(lang.read_facts(text), lang.ROLES)
    answer = {}
    for symbol in asked.split(", "):
        first, *second = table[symbol].most_common(2) if symbol in table else [("", 0)]
        if first[1] and not (second and second[0][1] == first[1]):
            answer[symbol] = first[0]
    return answer


def look_ups(rng: random.Random, name: str, count: int, thinking: bool = True) -> list[str]:
    """`count` glossary prompts about the roles of one game, each with something to look up."""
    family = lang.LAKE_ROLES if name == "frozen_lake" else lang.ROOM_ROLES
    found: list[str] = []
    while len(found) < count:
        prompt = examples.draw_glossary(rng, thinking).prompt
        answer = look_up_answer(prompt)
        if answer and set(answer.values()) <= set(family):
            found.append(prompt)
    return found


def judge_look_up(prompt: str, reply: str) -> bool:
    """Whether every symbol with a known answer was given that role, and no other."""
    stated = beliefs(reply)
    return all(stated.get(symbol) == {role} for symbol, role in look_up_answer(prompt).items())


def judge_instruction(reply: str, answer: str) -> bool:
    """Strict equality of what follows the thought."""
    return answers.split_thought(reply, opened=False)[0] == answer


def earlier_games(rng: random.Random, histories: Sequence[tuple[bool, str]], count: int) -> str:
    """Raw trajectories in place of knowledge: `count` of the (won, history) games, one of them won
    if any was, in drawn order."""
    won = [text for passed, text in histories if passed]
    lost = [text for passed, text in histories if not passed]
    chosen = [rng.choice(won)] if won else []
    rest = lost or won
    chosen += [rng.choice(rest) for _ in range(count - len(chosen))]
    rng.shuffle(chosen)
    return "".join(chosen)
