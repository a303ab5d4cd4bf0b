"""Trajectories: the one thing that crosses from the user side to the server side.

A file is JSON Lines in UTF-8: one finished game per line, lines ending in "\\n". Schema
`oel.trajectory/1`, every key required, no others allowed:

    schema    "oel.trajectory/1"
    game      string, the game's name; not empty
    seed      integer in [0, 2^63): which board or conversation it was
    policy    string, which model played, for instance "round_001"; not empty
    round     integer from 1
    purpose   "extract" (knowledge is drawn from it), "deploy" (its prefixes are trained on) or
              "demonstrate" (played with knowledge, for the off-policy baselines)
    chain     integer from 0, or null: extraction chain
    step      integer from 0, or null: extraction step or deploy step
    turns     list, not empty; per turn:
        prompt        string, the user message; not empty
        prompt_ids    list of integers in [0, 2^31), what the model read; not empty
        response      string, the decoded response (thought included)
        response_ids  list of integers in [0, 2^31), the sampled ids, stop id included
        action        string, the parsed action
        observation   string, what the environment said before this turn (extraction history)
    outcome   string, how the game ended, in words

There is no reward, on purpose: learning uses text feedback only, so an unknown key such as "reward"
is refused rather than ignored. A game is identified by (game, seed, policy, round, purpose, chain,
step), and a file holds it once. Strings are plain text from outside; they must be encodable in
UTF-8.

Nothing here imports JAX or the rest of the package. Source: spec, section 7.
"""

import json
import logging
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from oel_jax.errors import UserError

SCHEMA = "oel.trajectory/1"
PURPOSES = ("extract", "deploy", "demonstrate")
_MAX_ID = 2**31
_MAX_SEED = 2**63

logger = logging.getLogger(__name__)


def _ids(values: Iterable[Any]) -> tuple[int, ...]:
    """Token ids as Python ints, whatever integer type they come in (NumPy scalars too)."""
    return tuple(operator.index(value) for value in values)


@dataclass(frozen=True)
class Turn:
    """One prompt and its response. Id sequences of any integer type are accepted."""

    prompt: str
    prompt_ids: tuple[int, ...]
    response: str
    response_ids: tuple[int, ...]
    action: str
    observation: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", _ids(self.prompt_ids))
        object.__setattr__(self, "response_ids", _ids(self.response_ids))


@dataclass(frozen=True, repr=False)
class Trajectory:
    """One finished game; the fields are those of the schema."""

    game: str
    seed: int
    policy: str
    round: int
    purpose: str
    chain: int | None
    step: int | None
    turns: tuple[Turn, ...]
    outcome: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(self.turns))

    def __repr__(self) -> str:
        """One line for notebooks, without the texts and ids of the turns."""
        what = f"{self.game} seed {self.seed}, {self.policy}, round {self.round}, {self.purpose}"
        return f"Trajectory({what}, {len(self.turns)} turns, {self.outcome!r})"

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the game within a file."""
        return (
            self.game,
            self.seed,
            self.policy,
            self.round,
            self.purpose,
            self.chain,
            self.step,
        )


class Prefix(NamedTuple):
    """The history of a game up to one response: what consolidation trains on.

    `game` is the index of the trajectory in the sequence given to `prefixes`, `turn` counts from 0.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    game: int
    turn: int


def prefixes(trajectories: Sequence[Trajectory]) -> list[Prefix]:
    """All prefixes of all games, ordered by game, then by turn (spec 7); nothing is filtered."""
    return [
        Prefix(turn.prompt, turn.prompt_ids, game, t)
        for game, trajectory in enumerate(trajectories)
        for t, turn in enumerate(trajectory.turns)
    ]


class _NotJSON(ValueError):
    """The bytes are not a JSON text: a torn write, or not our file."""


class _NotATrajectory(ValueError):
    """A JSON text that does not follow the schema."""


def _check_text(value: Any, where: str, *, empty: bool = True) -> None:
    if not isinstance(value, str):
        raise _NotATrajectory(f"{where} must be a string, got {_show(value)}")
    if not value and not empty:
        raise _NotATrajectory(f"{where} must not be empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _NotATrajectory(
            f"{where} holds half a surrogate pair at character {error.start}, which is no text"
        ) from error


def _check_int(value: Any, where: str, low: int, high: int, *, null: bool = False) -> None:
    if null and value is None:
        return
    if type(value) is not int or not low <= value < high:
        kind = f"an integer from {low} to {high - 1}" + (" or null" if null else "")
        raise _NotATrajectory(f"{where} must be {kind}, got {_show(value)}")


def _check_ids(value: Any, where: str, *, empty: bool) -> None:
    if not isinstance(value, list | tuple):
        raise _NotATrajectory(f"{where} must be a list of token ids, got {_show(value)}")
    if not value and not empty:
        raise _NotATrajectory(f"{where} must not be empty")
    for i, token in enumerate(value):
        if type(token) is not int or not 0 <= token < _MAX_ID:
            _check_int(token, f"{where}[{i}]", 0, _MAX_ID)


def _check_keys(record: Any, expected: Sequence[str], where: str) -> None:
    if not isinstance(record, dict):
        raise _NotATrajectory(f"{where} must be a JSON object, got {_show(record)}")
    unknown = [key for key in record if key not in expected]
    if unknown:
        hint = "; trajectories carry no rewards" if "reward" in str(unknown).lower() else ""
        raise _NotATrajectory(f"{where} has the unknown key {_show(unknown[0])}{hint}")
    missing = [key for key in expected if key not in record]
    if missing:
        raise _NotATrajectory(f"{where} lacks the key {missing[0]!r}")


def _show(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**20:
        return "an integer of more than 20 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_TURN_KEYS = tuple(field.name for field in fields(Turn))
_KEYS = ("schema", *(field.name for field in fields(Trajectory)))


def _check_record(record: Any) -> None:
    """Raise `_NotATrajectory` unless `record` follows the schema to the letter."""
    if isinstance(record, dict) and record.get("schema") != SCHEMA:
        raise _NotATrajectory(
            f"schema is {_show(record.get('schema'))}, this version reads {SCHEMA!r}; "
            "convert the file or collect it again"
        )
    _check_keys(record, _KEYS, "the line")
    _check_text(record["game"], "game", empty=False)
    _check_text(record["policy"], "policy", empty=False)
    _check_text(record["outcome"], "outcome")
    _check_int(record["seed"], "seed", 0, _MAX_SEED)
    _check_int(record["round"], "round", 1, _MAX_ID)
    _check_int(record["chain"], "chain", 0, _MAX_ID, null=True)
    _check_int(record["step"], "step", 0, _MAX_ID, null=True)
    if record["purpose"] not in PURPOSES:
        raise _NotATrajectory(
            f"purpose must be one of {', '.join(PURPOSES)}, got {_show(record['purpose'])}"
        )
    turns = record["turns"]
    if not isinstance(turns, list | tuple) or not turns:
        raise _NotATrajectory(f"turns must be a list of at least one turn, got {_show(turns)}")
    for t, turn in enumerate(turns):
        where = f"turns[{t}]"
        _check_keys(turn, _TURN_KEYS, where)
        _check_text(turn["prompt"], f"{where}.prompt", empty=False)
        for key in ("response", "action", "observation"):
            _check_text(turn[key], f"{where}.{key}")
        _check_ids(turn["prompt_ids"], f"{where}.prompt_ids", empty=False)
        _check_ids(turn["response_ids"], f"{where}.response_ids", empty=True)


def _refuse_constant(name: str) -> NoReturn:
    raise _NotATrajectory(f"{name} is no JSON value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise _NotATrajectory(f"the key {_show(twice)} occurs twice")
    return record


def _decode(line: bytes) -> Trajectory:
    """One line as a trajectory. Raises `_NotJSON` or `_NotATrajectory`."""
    try:
        text = line.decode("utf-8")
        record = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise _NotJSON(f"not UTF-8 (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise _NotJSON(f"not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise _NotATrajectory("nested far deeper than a trajectory") from error
    except (_NotJSON, _NotATrajectory):
        raise
    except ValueError as error:  # Python's limit on the digits of one integer
        raise _NotATrajectory(f"a number is too large ({error})") from error
    _check_record(record)
    turns = tuple(Turn(**turn) for turn in record["turns"])
    rest = {key: record[key] for key in _KEYS if key not in ("schema", "turns")}
    return Trajectory(turns=turns, **rest)


def _encode(trajectory: Trajectory) -> bytes:
    record = {"schema": SCHEMA, **vars(trajectory)}  # asdict would copy every id
    record["turns"] = [vars(turn) for turn in trajectory.turns]
    try:
        _check_record(record)
    except _NotATrajectory as error:
        raise ValueError(f"cannot write this trajectory: {error}") from error
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8") + b"\n"


def write_line(file: BinaryIO, trajectory: Trajectory) -> None:
    """Write one game as one line to a binary file. Raises ValueError if it breaks the schema.

    For a file that must survive a crash use `TrajectoryWriter`.
    """
    file.write(_encode(trajectory))


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"trajectory file {path} cannot be read: {error.strerror}; "
            "check the path, or run the deploy stage that writes it"
        ) from error


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    return enumerate(iter(file.readline, b""), start=1)


def read(path: str | Path, *, on_bad: str = "error") -> list[Trajectory]:
    """All games of a file, ordered by (round, step, chain, seed), not by who finished first.

    Args:
        path: a JSON Lines file of this schema.
        on_bad: 'error' stops at the first bad line; 'skip' leaves bad lines out and logs a warning
            with file and line for each.

    Raises:
        UserError: naming file and line: not UTF-8, not JSON, wrong schema version, unknown, missing
            or doubled key, wrong type or range, a game that an earlier line holds already; naming
            the file: it cannot be read, is empty, or has no good line.
    """
    path = Path(path)
    if on_bad not in ("error", "skip"):
        raise UserError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
    games: list[Trajectory] = []
    seen: dict[tuple[Any, ...], int] = {}
    number = skipped = 0
    with _open(path) as file:
        for number, line in _lines(file):
            try:
                trajectory = _decode(line)
                if trajectory.key in seen:
                    raise _NotATrajectory(f"the game of line {seen[trajectory.key]} again")
            except (_NotJSON, _NotATrajectory) as error:
                if on_bad == "error":
                    raise UserError(_complaint(path, number, line, error)) from error
                logger.warning("%s:%d: skipped: %s", path, number, error)
                skipped += 1
                continue
            seen[trajectory.key] = number
            games.append(trajectory)
    if number == 0:
        raise UserError(
            f"trajectory file {path} is empty; remove it and run the deploy stage again"
        )
    if not games:
        raise UserError(f"trajectory file {path} has no good line ({skipped} skipped)")
    if skipped:
        logger.warning("%s: skipped %d of %d lines", path, skipped, number)
    return sorted(games, key=_order)


def _order(game: Trajectory) -> tuple[int, int, int, int]:
    def first(value: int | None) -> int:
        return -1 if value is None else value

    return (game.round, first(game.step), first(game.chain), game.seed)


def _complaint(path: Path, number: int, line: bytes, error: Exception) -> str:
    if isinstance(error, _NotJSON) and not line.endswith(b"\n"):
        advice = "the last line was cut off; run the stage that writes this file again to redo it"
    else:
        advice = "correct or remove the line, or read the file with on_bad='skip'"
    return f"{path}:{number}: {error}; {advice}"


class TrajectoryWriter:
    """Appends finished games to a file, one line each; safe against a crash at any instant.

    Opening creates the file, or reads the games of an existing one: `finished` holds them in
    canonical order, so that only missing games are played. A torn last line (not JSON) is cut off
    with a warning, a complete last line without its newline gets it. Anything else that is wrong is
    a UserError with file and line, and the file stays as it is.

    A line reaches the file by one append, is flushed at once, and is synced to disk every
    `sync_every` lines and on `close`. A write that fails (disk full) leaves the file without the
    partial line.

        with TrajectoryWriter(path) as writer:
            done = {game.seed for game in writer.finished}
            writer.write(trajectory)

    Args:
        path: the file; its directory must exist.
        sync_every: lines between two syncs; 1 loses nothing when the machine goes down, a larger
            number may lose that many last lines in that case (none when only the process dies).

    Raises:
        UserError: the file cannot be opened or written, or a line other than the last is bad.
    """

    def __init__(self, path: str | Path, *, sync_every: int = 1) -> None:
        if sync_every < 1:
            raise ValueError(f"sync_every must be at least 1, got {sync_every}")
        self.path = Path(path)
        self._sync_every = sync_every
        self._unsynced = 0
        try:
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise UserError(
                f"trajectory file {self.path} cannot be written: {error.strerror}; "
                "choose a workdir that exists and is writable"
            ) from error
        try:
            self.finished = self._recover()
        except UserError:
            self._file.close()
            raise
        self._keys = {game.key for game in self.finished}

    def _recover(self) -> list[Trajectory]:
        """Games already in the file; repairs its last line."""
        games: dict[tuple[Any, ...], Trajectory] = {}
        end = 0  # of the last good line
        with _open(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            for number, line in _lines(file):
                try:
                    game = _decode(line)
                    if game.key in games:
                        raise _NotATrajectory("a game that an earlier line holds already")
                except (_NotJSON, _NotATrajectory) as error:
                    # A first line that does not even begin like JSON is somebody else's file.
                    ours = number > 1 or line[:1] in (b"{", b"\0")
                    if isinstance(error, _NotJSON) and end + len(line) == size and ours:
                        logger.warning(
                            "%s:%d: cut off a damaged last line (%s)", self.path, number, error
                        )
                        break
                    raise UserError(_complaint(self.path, number, line, error)) from error
                games[game.key] = game
                end += len(line)
        self._file.truncate(end)
        if games and not line.endswith(b"\n") and end == size:
            self._append(b"\n")
        self._sync()
        return sorted(games.values(), key=_order)

    def write(self, trajectory: Trajectory) -> None:
        """Append one finished game.

        Raises:
            ValueError: it breaks the schema, or the file holds this game already.
            UserError: the disk refuses the write; the file then ends with the line before.
        """
        if trajectory.key in self._keys:
            raise ValueError(f"{self.path} holds the game {trajectory.key} already")
        self._append(_encode(trajectory))
        self._keys.add(trajectory.key)
        self._unsynced += 1
        if self._unsynced >= self._sync_every:
            self._sync()

    def _append(self, line: bytes) -> None:
        start = os.fstat(self._file.fileno()).st_size
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}; "
                "make room and run the same command again, it goes on from here"
            ) from error
        finally:
            if rest:  # neither a full disk nor Ctrl-C between two partial writes leaves half a line
                self._file.truncate(start)

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def close(self) -> None:
        """Sync and close; closing twice does nothing."""
        if not self._file.closed:
            self._sync()
            self._file.close()

    def __enter__(self) -> "TrajectoryWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
