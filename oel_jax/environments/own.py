"""A user's own games, from a Python file: loaded by path, tried before anything else is loaded."""

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from oel_jax.base.errors import UserError

_TEXTS = ("situation", "observation", "board_id")
_loaded: dict[str, list[str]] = {}


def load(file: str, known: dict[str, Any]) -> list[str]:
    """Run `file`, which calls `games.register`; modules next to it can be imported by it.

    A file is run once in a process.

    Args:
      known: the registered games, filled by the file.

    Returns:
      The names that it has registered.

    Raises:
      UserError: there is no such file, it fails (its own lines are shown), or registers nothing.
    """
    path = Path(file).expanduser().resolve()
    where = f"config.game.module={file}"
    if str(path) in _loaded:
        return _loaded[str(path)]
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{where}: there is no such Python file")
    name = f"oel_game_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    before = set(known)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{where}: {_own_line(error, path)}") from error
    new = sorted(set(known) - before)
    if not new:
        raise UserError(
            f"{where} registers no game; end it with oel_jax.environments.register(NAME, CLASS)"
        )
    _loaded[str(path)] = new
    return new


def check(name: str, factory: Any, seed: int, layout: str, max_turns: int) -> None:
    """Play one game with a scripted answer and look at everything that it says.

    Raises:
      UserError: a method is missing, fails, or gives a value of the wrong type or shape; or the
        game is not done after `max_turns`.
    """

    def bad(what: str) -> UserError:
        return UserError(
            f"game {name!r}, tried with seed {seed}: {what} "
            "(oel_jax/environments/protocol.py shows a complete game)"
        )

    def ask(game: Any, method: str, kind: type, *arguments: Any) -> Any:
        if not callable(getattr(game, method, None)):
            raise bad(f"it has no method {method}()")
        try:
            value = getattr(game, method)(*arguments)
        except Exception as error:
            raise bad(f"{method}() fails: {_own_line(error)}") from error
        if not isinstance(value, kind):
            raise bad(f"{method}() gives {value!r}; it must give a {kind.__name__}")
        return value

    def read(game: Any, field: str, kind: type) -> Any:
        try:
            value = getattr(game, field)
        except AttributeError as error:
            raise bad(f"it has no attribute {field} ({error})") from error
        if type(value) is not kind:
            raise bad(f"{field} is {value!r}; it must be a {kind.__name__}")
        return value

    def start() -> Any:
        try:
            return factory(seed, layout)
        except Exception as error:
            raise bad(f"it does not start: {_own_line(error)}") from error

    game = start()
    ids = [ask(one, "board_id", str) for one in (game, start())]
    if ids[0] != ids[1] or "\n" in ids[0]:
        raise bad(f"board_id() must be one line, the same for equal seeds; it gives {ids}")
    for turn in range(max_turns):
        if read(game, "turns", int) != turn:
            raise bad(f"turns is {game.turns} before turn {turn + 1}; each step must add one")
        for method in _TEXTS:
            text = ask(game, method, str)
            if method == "situation" and (not text.endswith("\n") or text.endswith("\n\n")):
                raise bad(f"situation() must end in exactly one newline; it ends {text[-20:]!r}")
        if read(game, "done", bool):
            raise bad("it is done before it was played")
        ask(game, "step", str, "I answer [right]")
        if read(game, "done", bool):
            break
    else:
        raise bad(
            f"it is not done after {max_turns} turns; set config.game.max_turns to its most turns"
        )
    read(game, "passed", bool)
    ask(game, "outcome", str)


def _own_line(error: Exception, path: Path | None = None) -> str:
    """What went wrong, with the last line of the user's own file."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if path is None or Path(f.filename) == path]
    place = f" ({Path(mine[-1].filename).name}, line {mine[-1].lineno})" if mine else ""
    return f"{type(error).__name__}: {error}{place}"
