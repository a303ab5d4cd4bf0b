"""Training examples of the nano model: one prompt and one reply, as text.

Tasks: `play` (no knowledge), `play_known` (knowledge in the paper's wrapper), `extract` (the
paper's extraction prompts), `glossary` (recite roles from a list: makes look-up emerge) and
`instruct` (tiny tasks that can be checked strictly). Prompts come from `oel_jax.prompts`, so they
are the real game's.
"""

import dataclasses
import random
from collections.abc import Sequence

from oel_jax import prompts
from oel_jax.nano import language as lang
from oel_jax.nano.worlds import Lake, World, decide, draw_world, play_out

Facts = Sequence[tuple[str, str]]
TASKS = {"play": 0.17, "play_known": 0.45, "extract": 0.19, "glossary": 0.14, "instruct": 0.05}
# until look-up has emerged, mostly the task that trains nothing else
EARLY_TASKS = TASKS | {"play": 0.1, "play_known": 0.3, "extract": 0.1, "glossary": 0.45}
# at the end: mostly play with partial knowledge
LATE_TASKS = TASKS | {"play": 0.15, "play_known": 0.62, "extract": 0.13, "glossary": 0.08}
LATE_TASKS["instruct"] = 0.02
_MIXTURES = {"early": EARLY_TASKS, "main": TASKS, "late": LATE_TASKS}
ENGINE = "You are an agent playing a game on a grid, acting as a reasoning engine."


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example: `task`, the user message, and the whole reply of the model."""

    task: str
    prompt: str
    reply: str


def knowledge_text(items: Sequence[str], version: str) -> str:
    """Items as a knowledge text: one line each, with the marker in v4 and without it in v3."""
    return "\n".join((lang.MARKER + item) if version == "v4" else item for item in items)


def draw_version(rng: random.Random) -> str:
    """'v4' mostly, 'v3' sometimes."""
    return "v4" if rng.random() < 0.8 else "v3"


def draw_items(rng: random.Random, facts: Facts, limit: int = 28, wrong: float = 0.04) -> list[str]:
    """An experience list around `facts`: repeated unevenly, partly wrong, with distractors.

    Every fact occurs at least once (rightly, but for the share `wrong`); the order is drawn.
    """
    weights = [0.05 + rng.random() ** 2 for _ in facts]
    extra = 0
    if rng.random() >= 0.4:
        extra = min(int(rng.expovariate(1 / rng.choice((2, 5, 10)))), limit - len(facts))
    chosen = list(facts) + (rng.choices(list(facts), weights, k=extra) if facts else [])
    items = []
    for letter, role in chosen:
        if rng.random() < wrong:
            role = rng.choice([r for r in lang.ROLES if r != role])
        items.append(lang.fact_sentence(rng, letter, role))
    while len(items) < limit and rng.random() < (0.2 if items else 0.9):
        items.append(rng.choice(lang.ADVICE))
    rng.shuffle(items)
    return items


def draw_knowledge(
    rng: random.Random, world: World, *, whole: float = 0.55, others: float = 0.35
) -> list[str]:
    """Items about a world: all its letters with probability `whole`, else some of them.

    With probability `others` letters that are not on the board are mentioned as well.
    """
    everything = rng.random() < whole
    facts = [f for f in world.roles.items() if everything or rng.random() < 0.5]
    if rng.random() < others:
        absent = [x for x in lang.LETTERS if x not in world.roles]
        facts += [(x, rng.choice(lang.ROLES)) for x in rng.sample(absent, rng.choice((1, 1, 2, 4)))]
    return draw_items(rng, facts)


def _midgame(rng: random.Random, world: World) -> Lake:
    """A game of `world` at a turn that some player could be at."""
    knowing = rng.choice((0.0, 0.0, 0.5, 1.0))
    finished, _ = play_out(rng, world, list(world.roles.items()), knowing=knowing, stray=0.05)
    stop = rng.randrange(finished.turns)
    game = Lake(world)
    for direction in finished.moves[:stop]:
        game.step(direction)
    return game


def draw_play(rng: random.Random, infer: bool = False) -> Example:
    """A turn without knowledge: every letter is guessed anew."""
    game = _midgame(rng, draw_world(rng))
    _, reply = decide(rng, game, (), clumsy=0.06)
    return Example("play", prompts.play_prompt(game.situation()), reply)


def draw_play_known(rng: random.Random, infer: bool = False) -> Example:
    """A turn with knowledge in the prompt."""
    world = draw_world(rng)
    game = _midgame(rng, world)
    shares = {"whole": 0.25, "others": 0.1} if infer else {}
    knowledge = knowledge_text(draw_knowledge(rng, world, **shares), draw_version(rng))
    _, reply = decide(rng, game, lang.read_facts(knowledge), clumsy=0.06, infer=infer)
    return Example("play_known", prompts.play_prompt(game.situation(), knowledge), reply)


def draw_game(rng: random.Random) -> tuple[World, Lake, list[tuple[str, str]]]:
    """A finished game whose result is drawn first, so that wins are as common as losses."""
    wanted = rng.choices(("win", "lose", "time", "invalid"), (0.42, 0.34, 0.2, 0.04))[0]
    for _ in range(60):
        world = draw_world(rng)
        facts: Facts = list(world.roles.items())
        if rng.random() < 0.15:
            facts = [(letter, rng.choice(lang.ROLES)) for letter, _ in facts]
        knowing = rng.choice((0.0, 0.6, 0.9, 1.0) if wanted == "win" else (0.0, 0.0, 0.5, 0.9))
        clumsy = 0.6 if wanted == "invalid" else 0.06
        game, turns = play_out(rng, world, facts, knowing=knowing, stray=0.08, clumsy=clumsy)
        if game.result == wanted:
            break
    return world, game, turns


def evidence(game: Lake) -> list[tuple[str, str]]:
    """What a finished game shows about letters: the end first, then safe letters crossed."""
    found = []
    if game.result in ("win", "lose"):
        row, column = game.place
        found.append((game.world.rows[row][column], game.result))
    return found + [(letter, "safe") for letter in dict.fromkeys(game.crossed)]


def extraction_reply(rng: random.Random, game: Lake, version: str) -> str:
    """Thought and items for a finished game."""
    cell = game.target_of_last_move()
    target = None if cell is None else game.world.rows[cell[0]][cell[1]]
    where = (
        lang.TO_WALL
        if target is None
        else lang.TO_FREE
        if target == " "
        else f"{lang.TO_LETTER}{target}."
    )
    thought = lang.LAST_STEP + where + lang.VERDICT[game.result]
    thought += "".join(f"{lang.CROSSED}{letter}." for letter in dict.fromkeys(game.crossed))
    found = evidence(game)
    items = [lang.fact_sentence(rng, *fact) for fact in found[:2]]
    if not items:
        items = [lang.ADVICE_WALL if game.result == "invalid" else lang.ADVICE_TIME]
    elif len(items) == 1 and rng.random() < 0.08:
        items.append(rng.choice(lang.ADVICE))
    text = knowledge_text(items, version)
    return lang.response(thought, (lang.HEADING if version == "v4" else "") + text)


def draw_extract(rng: random.Random, infer: bool = False) -> Example:
    """The extraction prompt for a finished game, with or without previous knowledge."""
    world, game, turns = draw_game(rng)
    version = draw_version(rng)
    previous = ""
    if rng.random() < 0.55:
        previous = knowledge_text(draw_knowledge(rng, world, whole=0.4), version)
    history = prompts.extraction_history(turns, game.outcome())
    prompt = prompts.extraction_prompt(history, previous, version=version)
    return Example("extract", prompt, extraction_reply(rng, game, version))


def draw_glossary(rng: random.Random, infer: bool = False) -> Example:
    """Recite what each of a few letters does, from an experience list."""
    letters = rng.sample(lang.LETTERS, rng.randint(1, 7))
    facts = [(x, rng.choice(lang.ROLES)) for x in letters]
    knowledge = knowledge_text(draw_items(rng, facts, wrong=0.02), draw_version(rng))
    asked = rng.sample(letters, max(1, len(letters) - rng.choice((0, 0, 1, 3))))
    if rng.random() < 0.15:
        asked.append(rng.choice([x for x in lang.LETTERS if x not in letters]))
        rng.shuffle(asked)
    beliefs, guessed = lang.believe(rng, asked, lang.read_facts(knowledge), infer=infer)
    head = prompts.play_prompt("", knowledge).split("\n\nCurrent situation:")[0]
    prompt = head + lang.GLOSSARY_QUESTION + ", ".join(asked)
    return Example(
        "glossary", prompt, lang.response(lang.belief_text(rng, beliefs, guessed), "done")
    )


def draw_instruct(rng: random.Random, infer: bool = False) -> Example:
    """A tiny instruction with one right answer."""
    letters = [rng.choice(lang.LETTERS) for _ in range(rng.randint(2, 5))]
    kind = rng.choice(("repeat", "reverse", "first", "last"))
    answer = {
        "repeat": letters,
        "reverse": letters[::-1],
        "first": letters[:1],
        "last": letters[-1:],
    }[kind]
    text = f"Symbols: {', '.join(letters)}. Please {lang.INSTRUCTIONS[kind]}."
    return Example("instruct", text, lang.response("", ", ".join(answer)))


_DRAW = {
    "play": draw_play,
    "play_known": draw_play_known,
    "extract": draw_extract,
    "glossary": draw_glossary,
    "instruct": draw_instruct,
}


def draw_example(rng: random.Random, phase: str = "main") -> Example:
    """One example of the phase 'early', 'main' or 'late', which have different shares of tasks.

    In 'late' players with knowledge draw conclusions about letters that it does not mention.
    """
    mixture = _MIXTURES[phase]
    task = rng.choices(list(mixture), list(mixture.values()))[0]
    return _DRAW[task](rng, phase == "late")
