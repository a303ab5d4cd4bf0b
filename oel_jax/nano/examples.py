"""Training examples of the nano models: one prompt and one reply, as text.

For each game: `play` (no knowledge), `known` (knowledge in the paper's wrapper), `raw` (raw
trajectories in that wrapper) and `extract` (the paper's extraction prompts). Further: `glossary`
(recite roles from a list: makes look-up emerge) and `instruct` (tiny tasks that can be checked
strictly). Prompts come from `oel_jax.data.prompts`, so they are the real games'.
"""

import dataclasses
import random
from collections.abc import Callable

from oel_jax.data import prompts
from oel_jax.nano import lake, room
from oel_jax.nano import language as lang
from oel_jax.nano.players import AnyWorld, Facts, Game, begin, decide, draw, play_out

ENGINE = "You are an agent playing a game on a grid, acting as a reasoning engine."
THINKING = 0.85  # share of examples with the thinking mode on

# Shares of the examples; the early mixture is used until look-up has emerged.
TASKS = {
    "play_frozen_lake": 0.08,
    "play_sokoban": 0.05,
    "known_frozen_lake": 0.22,
    "known_sokoban": 0.22,
    "raw_frozen_lake": 0.03,
    "raw_sokoban": 0.02,
    "extract_frozen_lake": 0.13,
    "extract_sokoban": 0.10,
    "glossary": 0.10,
    "instruct": 0.05,
}
EARLY_TASKS = {
    "play_frozen_lake": 0.04,
    "play_sokoban": 0.04,
    "known_frozen_lake": 0.12,
    "known_sokoban": 0.10,
    "raw_frozen_lake": 0.01,
    "raw_sokoban": 0.01,
    "extract_frozen_lake": 0.04,
    "extract_sokoban": 0.04,
    "glossary": 0.40,
    "instruct": 0.20,
}
_MIXTURES = {"early": EARLY_TASKS, "main": TASKS}


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example: `task`, the user message, the whole reply, and the mode."""

    task: str
    prompt: str
    reply: str
    thinking: bool = True


def knowledge_text(items: list[str], version: str) -> str:
    """Items as a knowledge text: one line each, with the marker in v4 and without it in v3."""
    return "\n".join((lang.MARKER + item) if version == "v4" else item for item in items)


def draw_version(rng: random.Random) -> str:
    """'v4' mostly, 'v3' sometimes."""
    return "v4" if rng.random() < 0.8 else "v3"


def draw_items(
    rng: random.Random, facts: Facts, limit: int = 16, wrong: float = 0.04, fresh: bool = False
) -> list[str]:
    """An experience list around `facts`: repeated unevenly, partly wrong, with distractors.

    Every fact occurs at least once (rightly, but for the share `wrong`); the order is drawn. With
    `fresh` no sentence occurs twice, as when an extractor never repeats itself.
    """
    weights = [0.05 + rng.random() ** 2 for _ in facts]
    extra = 0
    if rng.random() >= 0.4:
        extra = max(0, min(int(rng.expovariate(1 / rng.choice((2, 4, 7)))), limit - len(facts)))
    chosen = list(facts) + (rng.choices(list(facts), weights, k=extra) if facts else [])
    items: list[str] = []
    for symbol, role in chosen:
        if rng.random() < wrong:
            family = lang.LAKE_ROLES if role in lang.LAKE_ROLES else lang.ROOM_ROLES
            role = rng.choice([r for r in family if r != role])
        sentence = lang.fact_sentence(rng, symbol, role, "\n".join(items) if fresh else "")
        items += [sentence] if sentence else []
    while len(items) < limit and rng.random() < (0.25 if items else 0.9):
        items.append(rng.choice((*lang.ADVICE, lang.NOTHING_NEW)))
    rng.shuffle(items)
    return list(dict.fromkeys(items)) if fresh else items


def draw_knowledge(
    rng: random.Random, world: AnyWorld, *, whole: float = 0.45, others: float = 0.3
) -> list[str]:
    """Items about a world: all its symbols with probability `whole`, else some of them.

    With probability `others` symbols that are not on the board are mentioned as well, now and then
    with a role of the other game.
    """
    everything = rng.random() < whole
    facts = [f for f in world.roles.items() if everything or rng.random() < 0.5]
    if rng.random() < others:
        absent = [x for x in lang.SYMBOLS if x not in world.roles]
        same = lang.LAKE_ROLES if isinstance(world, lake.World) else lang.ROOM_ROLES
        roles = same if rng.random() < 0.7 else lang.ROLES
        facts += [(x, rng.choice(roles)) for x in rng.sample(absent, rng.choice((1, 1, 2, 3)))]
    return draw_items(rng, facts, fresh=rng.random() < 0.5)


def _midgame(rng: random.Random, world: AnyWorld) -> Game:
    """A game of `world` at a turn that some player could be at."""
    knowing = rng.choice((0.0, 0.0, 0.5, 1.0))
    finished, _ = play_out(
        rng, world, list(world.roles.items()), knowing=knowing, stray=0.05, thinking=False
    )
    game = begin(world)
    for direction in finished.moves[: rng.randrange(finished.turns)]:
        game.step(direction)
    return game


def draw_play(rng: random.Random, name: str, thinking: bool) -> Example:
    """A turn without knowledge: every symbol is guessed anew."""
    game = _midgame(rng, draw(rng, name))
    _, reply = decide(rng, game, (), clumsy=0.06, thinking=thinking)
    return Example(f"play_{name}", prompts.play_prompt(game.situation()), reply, thinking)


def draw_known(rng: random.Random, name: str, thinking: bool) -> Example:
    """A turn with knowledge in the prompt."""
    world = draw(rng, name)
    game = _midgame(rng, world)
    knowledge = knowledge_text(draw_knowledge(rng, world), draw_version(rng))
    facts = lang.read_facts(knowledge)
    _, reply = decide(rng, game, facts, clumsy=0.06, thinking=thinking)
    prompt = prompts.play_prompt(game.situation(), knowledge)
    return Example(f"known_{name}", prompt, reply, thinking)


def draw_raw(rng: random.Random, name: str, thinking: bool) -> Example:
    """A turn with whole earlier games (of this world, if it can be) for knowledge (spec 10.5)."""
    world = draw(rng, name)
    histories, facts = [], []
    for _ in range(rng.choice((1, 1, 2)) if name == "frozen_lake" else 1):
        earlier, turns = draw_game(rng, name, dict(world.roles), thinking)
        histories.append(prompts.extraction_history(turns, earlier.outcome()))
        facts += earlier.evidence()
    game = _midgame(rng, world)
    _, reply = decide(rng, game, facts, clumsy=0.06, thinking=thinking)
    prompt = prompts.play_prompt(game.situation(), "".join(histories))
    return Example(f"raw_{name}", prompt, reply, thinking)


def _redress(world: AnyWorld, roles: dict[str, str]) -> AnyWorld | None:
    """The same board with the symbols of `roles`, symbol for symbol of equal role, or None."""
    mapping = {}
    for old, role in world.roles.items():
        fitting = [s for s, r in roles.items() if r == role and s not in mapping.values()]
        if not fitting:
            return None
        mapping[old] = fitting[0]
    renamed = {mapping[s]: role for s, role in world.roles.items()}
    if isinstance(world, lake.World):
        rows = tuple("".join(mapping.get(c, c) for c in row) for row in world.rows)
        return dataclasses.replace(world, rows=rows, roles=renamed)
    return dataclasses.replace(world, roles=renamed)


def draw_game(
    rng: random.Random, name: str, roles: dict[str, str] | None, thinking: bool
) -> tuple[Game, list[tuple[str, str]]]:
    """A finished game whose result is drawn first, so that wins are as common as losses.

    With `roles` the board bears those symbols, if such a board turns up.
    """
    shares = (0.42, 0.34, 0.2, 0.04) if name == "frozen_lake" else (0.5, 0.0, 0.32, 0.18)
    wanted = rng.choices(("win", "lose", "time", "invalid"), shares)[0]
    family = lang.LAKE_ROLES if name == "frozen_lake" else lang.ROOM_ROLES
    found = None
    for _ in range(60):
        world = draw(rng, name)
        world = _redress(world, roles) if roles else world
        if world is None:
            continue
        facts: Facts = list(world.roles.items())
        if rng.random() < 0.15:
            facts = [(symbol, rng.choice(family)) for symbol, _ in facts]
        knowing = rng.choice((0.0, 0.6, 0.9, 1.0) if wanted == "win" else (0.0, 0.0, 0.5, 0.9))
        clumsy = 0.6 if wanted == "invalid" else 0.06
        found = play_out(
            rng, world, facts, knowing=knowing, stray=0.08, clumsy=clumsy, thinking=thinking
        )
        if found[0].result == wanted:
            break
    # Few boards fit some worlds (all symbols safe): then another world's game has to do.
    return found or draw_game(rng, name, None, thinking)


def extraction_reply(
    rng: random.Random, game: Game, version: str, previous: str = "", thinking: bool = True
) -> str:
    """Thought and items for a finished game; no item repeats a line of `previous`.

    Facts the game shows come first, in a phrasing that is not there yet; then advice.
    """
    items: list[str] = []
    for symbol, role in game.evidence():
        sentence = lang.fact_sentence(rng, symbol, role, previous)
        if sentence and len(items) < 2:
            items.append(sentence)
    fitting = lang.ADVICE_WALL if game.result == "invalid" else lang.ADVICE_TIME
    advice = [a for a in (fitting, *lang.ADVICE, lang.NOTHING_NEW) if a not in previous]
    if not items or (len(items) == 1 and rng.random() < 0.05):
        items += advice[:1]
    answer = (lang.HEADING if version == "v4" else "") + knowledge_text(items, version)
    answer = answer.rstrip("\n")  # a bare heading where there is nothing left to say
    return lang.response(game.recap(), answer) if thinking else answer


def draw_extract(rng: random.Random, name: str, thinking: bool) -> Example:
    """The extraction prompt for a finished game, with or without previous knowledge."""
    game, turns = draw_game(rng, name, None, thinking)
    version = draw_version(rng)
    previous = ""
    if rng.random() < 0.7:
        previous = knowledge_text(draw_knowledge(rng, game.world, whole=0.5), version)
    history = prompts.extraction_history(turns, game.outcome())
    prompt = prompts.extraction_prompt(history, previous, version=version)
    reply = extraction_reply(rng, game, version, previous, thinking)
    return Example(f"extract_{name}", prompt, reply, thinking)


def draw_glossary(rng: random.Random, thinking: bool) -> Example:
    """Recite what each of a few symbols does, from an experience list of one game."""
    module, roles = rng.choice(((lake, lang.LAKE_ROLES), (room, lang.ROOM_ROLES)))
    symbols = rng.sample(lang.SYMBOLS, rng.randint(1, 6))
    facts = [(x, rng.choice(roles)) for x in symbols]
    items = draw_items(rng, facts, wrong=0.02, fresh=rng.random() < 0.3)
    knowledge = knowledge_text(items, draw_version(rng))
    asked = rng.sample(symbols, max(1, len(symbols) - rng.choice((0, 0, 1, 3))))
    if rng.random() < 0.15:
        asked.append(rng.choice([x for x in lang.SYMBOLS if x not in symbols]))
        rng.shuffle(asked)
    beliefs, guessed = module.believe(rng, asked, lang.read_facts(knowledge))
    head = prompts.play_prompt("", knowledge).split("\n\nCurrent situation:")[0]
    prompt = head + lang.GLOSSARY_QUESTION + ", ".join(asked)
    text = lang.belief_text(rng, beliefs, guessed)
    reply = lang.response(text, "done") if thinking else text
    return Example("glossary", prompt, reply, thinking)


def instruction(rng: random.Random, low: int = 2, high: int = 8) -> tuple[str, str]:
    """A tiny instruction and its only right answer."""
    count = rng.randint(low, high)
    symbols = [rng.choice(lang.SYMBOLS) for _ in range(count)]
    if rng.random() < 0.5:
        symbols = rng.sample(lang.SYMBOLS, count)
    kind = rng.choice(("repeat", "repeat", "reverse", "first", "last"))
    answer = {
        "repeat": symbols,
        "reverse": symbols[::-1],
        "first": symbols[:1],
        "last": symbols[-1:],
    }[kind]
    text = f"Symbols: {', '.join(symbols)}. Please {lang.INSTRUCTIONS[kind]}."
    return text, ", ".join(answer)


def draw_instruct(rng: random.Random, thinking: bool) -> Example:
    """A tiny instruction with one right answer."""
    text, answer = instruction(rng)
    return Example("instruct", text, lang.response("", answer) if thinking else answer, thinking)


_KINDS: dict[str, Callable[[random.Random, str, bool], Example]] = {
    "play": draw_play,
    "known": draw_known,
    "raw": draw_raw,
    "extract": draw_extract,
}


def draw_task(rng: random.Random, task: str) -> Example:
    """One example of a task; the mode (thinking or not) is drawn."""
    thinking = rng.random() < THINKING
    if task == "glossary":
        return draw_glossary(rng, thinking)
    if task == "instruct":
        return draw_instruct(rng, thinking)
    kind, _, name = task.partition("_")
    return _KINDS[kind](rng, name, thinking)


def draw_example(rng: random.Random, phase: str = "main") -> Example:
    """One example of the phase 'early' or 'main', which have different shares of tasks."""
    mixture = _MIXTURES[phase]
    return draw_task(rng, rng.choices(list(mixture), list(mixture.values()))[0])
