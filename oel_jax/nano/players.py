"""The scripted player of both kinds of world, whose turns the nano models learn to imitate."""

import random
from collections.abc import Sequence

from oel_jax.nano import language as lang
from oel_jax.nano.lake import Lake, World, draw_world
from oel_jax.nano.room import Room, RoomWorld, draw_room

Facts = Sequence[tuple[str, str]]
Game = Lake | Room
AnyWorld = World | RoomWorld
GAMES = ("frozen_lake", "sokoban")


def draw(rng: random.Random, game: str) -> AnyWorld:
    """A random world of 'frozen_lake' or 'sokoban'."""
    return draw_world(rng) if game == "frozen_lake" else draw_room(rng)


def begin(world: AnyWorld) -> Game:
    """A fresh game in a world."""
    return Lake(world) if isinstance(world, World) else Room(world)


def decide(
    rng: random.Random,
    game: Game,
    facts: Facts,
    *,
    clumsy: float = 0.0,
    blind: bool = False,
    thinking: bool = True,
) -> tuple[str, str]:
    """One turn of a player who believes `facts` and guesses the rest anew.

    `clumsy` is the chance of an impossible step where the player sees no way to win; `blind`
    takes any possible step. Returns the direction and the whole reply (the answer alone without
    `thinking`).
    """
    beliefs, guessed = game.believe(rng, facts)
    options = game.options(beliefs)
    if not game.hopeful(beliefs) and rng.random() < clumsy:
        passable = game.passable()
        options = [d for d in lang.DIRECTIONS if d not in passable] or options
    if blind:
        options = game.passable()
    direction = rng.choice(options)
    if not thinking:
        return direction, f"[{direction}]"
    parts = [lang.belief_text(rng, beliefs, guessed), game.plan_text(beliefs)]
    thought = " ".join(p for p in parts if p) + lang.step_text(direction, *game.ahead(direction))
    return direction, lang.response(thought, f"[{direction}]")


def play_out(
    rng: random.Random,
    world: AnyWorld,
    facts: Facts,
    *,
    knowing: float = 1.0,
    stray: float = 0.0,
    clumsy: float = 0.05,
    thinking: bool = True,
) -> tuple[Game, list[tuple[str, str]]]:
    """A whole game of the scripted player; returns it with its (observation, reply) turns.

    At each turn the player remembers `facts` with probability `knowing` and otherwise guesses;
    with probability `stray` the step is drawn blindly (and still reported truthfully).
    """
    game, turns = begin(world), []
    while not game.done:
        known = facts if rng.random() < knowing else ()
        observation = game.observation()
        blind = stray > 0 and rng.random() < stray
        direction, text = decide(rng, game, known, clumsy=clumsy, blind=blind, thinking=thinking)
        turns.append((observation, text))
        game.step(direction)
    return game, turns
