"""Text games: the user side of the loop. Nothing here imports JAX.

    game = make("frozen_lake", seed)
    while not game.done:
        response = policy(prompts.play_prompt(game.situation()))
        action = game.step(response)
    game.outcome(), game.passed

`register` adds your own game (`protocol` shows a complete one); `bounds` gives the pass rates
of random and perfect play that belong next to every result.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.environments import own
from oel_jax.environments.actions import NO_ACTION, parse_action
from oel_jax.environments.boards import FrozenLakeModel, SokobanModel
from oel_jax.environments.frozen_lake import FrozenLake
from oel_jax.environments.protocol import LAYOUTS, MAX_TURNS, Bounds, Game
from oel_jax.environments.seeds import deploy_seeds, extraction_seeds, heldout_seeds
from oel_jax.environments.sokoban import Sokoban

__all__ = [
    "LAYOUTS",
    "MAX_TURNS",
    "NO_ACTION",
    "Bounds",
    "Game",
    "board_ids",
    "bounds",
    "deploy_seeds",
    "extraction_seeds",
    "heldout_seeds",
    "known",
    "make",
    "model",
    "names",
    "parse_action",
    "register",
]

_factories: dict[str, Callable[[int, str], Game]] = {}
_bounds: dict[str, Bounds] = {}
_MODELS = {"frozen_lake": FrozenLakeModel, "sokoban": SokobanModel}


def register(name: str, factory: Callable[[int, str], Game], bounds: Bounds | None = None) -> None:
    """Make `factory(seed, layout)` available as game `name`.

    `layout` is the config's `game.layout` ('released' or 'paper'); a game with one layout ignores
    it. Raises ValueError when the name is taken by another factory.
    """
    if _factories.get(name, factory) is not factory:
        raise ValueError(f"there is a game named {name!r} already")
    _factories[name] = factory
    if bounds is not None:
        _bounds[name] = bounds


def names() -> list[str]:
    """The names of all games that `make` knows."""
    return sorted(_factories)


def known(game: Mapping[str, Any]) -> list[str]:
    """All names, with those of the file in `game.module`, whose game is tried at once.

    Args:
      game: the config's section `game`.

    Raises:
      UserError: the file or the game in it is not as it should be.
    """
    if game["module"]:
        own.load(game["module"], _factories)
    name = game["name"]
    if name in _factories and name not in _MODELS:
        seed = heldout_seeds(1)[0]
        own.check(name, _factories[name], seed, game["layout"], game["max_turns"])
    return names()


def _known(name: str) -> str:
    if name not in _factories:
        raise UserError(
            f"unknown game {name!r}; known: {', '.join(names())} "
            "(your own game is added with oel_jax.environments.register)"
        )
    return name


def make(name: str, seed: int, layout: str = "released") -> Game:
    """Start a new game. UserError: unknown name or layout; ValueError: bad seed."""
    return _factories[_known(name)](seed, layout)


def bounds(name: str) -> Bounds | None:
    """Floor and ceiling of a game's pass rate (spec 3.3); None when its author gave none."""
    return _bounds.get(_known(name))


@cache
def _board_id(name: str, seed: int) -> str:
    return make(name, seed).board_id()


def board_ids(name: str, seeds: Iterable[int]) -> list[str]:
    """The start boards of many seeds, for instance to tell boards that deployment has never shown.

    Cached by (name, seed): Frozen Lake boards cost about 0.05 ms each, Sokoban boards 1.5 ms.
    """
    return [_board_id(name, seed) for seed in seeds]


def model(name: str, board_id: str) -> FrozenLakeModel | SokobanModel:
    """The rules of a built-in game on one board (a `board_id`), for `boards.shortest` and the like.

    Raises UserError when the game has no model.
    """
    if name not in _MODELS:
        raise UserError(f"game {name!r} has no board model; there is one for: {', '.join(_MODELS)}")
    return _MODELS[name](board_id.split("/"))


# Means over the 128 held-out boards; the tests recompute them with `boards.random_play` (floors)
# and `boards.shortest` (ceilings: the share of boards that can be won in five moves). Floors are
# exact: a multiple of 1 / (128 * 4^5), 1.69 % and 16.40 %.
register("frozen_lake", FrozenLake, Bounds(floor=1107 / 65536, ceiling=1.0))
register("sokoban", Sokoban, Bounds(floor=21501 / 131072, ceiling=113 / 128))
