"""Runs the whole loop on one machine: a server, a learner, and players as separate processes.

    python -m oel_jax.online --config=nano_frozen_lake_online --workdir=runs/online

The server records what the players ask and say; when enough conversations have come, the learner
takes them, runs a round, and the server takes the new policy. After the last round the players play
`--last_games` more games, then everything stops. The learner has never seen a game: its process
imports no environment, and all it reads are the recorded conversations.

By hand, with a shared workdir (WORKDIR/online has the log of each part):

    python -m oel_jax.serve --workdir=W --port=8000
    python -m oel_jax.online.players --url=http://127.0.0.1:8000 --out=W/online/games.jsonl
    python -m oel_jax.main --config=nano_frozen_lake_online --workdir=W

Exit status: 0 finished; otherwise that of the part that ended first (see each part's own).
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.config.command_line import read_overrides, split_overrides
from oel_jax.config.defaults import with_fields
from oel_jax.config.file import load_config
from oel_jax.online.games import played, summarise
from oel_jax.runs.metrics import duration

_ADDRESS = re.compile(r"http://[\w.:\[\]-]+:\d+")
_UP = 600.0  # seconds for the server to load its model and compile
_DOWN = 60.0  # seconds for a part to end after it was asked to
_STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130}  # as main's


class Stopped(Exception):
    """This process was told to stop; `status` is its exit status then."""

    def __init__(self, status: int):
        super().__init__("stopped")
        self.status = status


class _Notice:
    """Remembers the first signal. Nothing is raised from a handler, so that parts are stopped."""

    def __init__(self) -> None:
        self._first: int | None = None
        for number in _STATUS:
            signal.signal(number, self._take)

    def _take(self, number: int, _: object) -> None:
        self._first = self._first or number

    def check(self) -> None:
        """Raises Stopped after a signal."""
        if self._first is not None:
            raise Stopped(_STATUS[self._first])


class _Part:
    """One process: its output goes to a file, and on request to the console too."""

    def __init__(self, name: str, command: Sequence[str], log: Path, *, shown: bool = False):
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(log, "ab")
        self.address = ""
        self._ready = threading.Event()
        # A session of its own: Ctrl-C reaches this process alone, which then stops the parts.
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._read, args=(shown,), daemon=True)
        self._reader.start()

    def _read(self, shown: bool) -> None:
        for line in self.process.stdout:
            self._file.write(line)
            self._file.flush()
            text = line.decode("utf-8", "replace")
            if not self.address and (found := _ADDRESS.search(text)):
                self.address = found[0]
                self._ready.set()
            if shown:
                sys.stdout.write(text)
                sys.stdout.flush()
        self._ready.set()

    def wait_for_address(self, notice: _Notice) -> str:
        """The URL that the part prints when it is ready.

        Raises:
          UserError: it ended, or printed none in time.
          Stopped: there was a signal.
        """
        end = time.monotonic() + _UP
        while not self._ready.wait(0.2):
            notice.check()
            if time.monotonic() > end:
                raise UserError(f"the {self.name} was not ready after {_UP:.0f} s: {self.tail()}")
        if not self.address:
            raise UserError(f"the {self.name} did not start: {self.tail()}")
        return self.address

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self.process.poll()

    def stop(self) -> int:
        """Ask the part to end, wait for it, kill it if it does not; returns its status."""
        if self.status is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(_DOWN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._reader.join(10)
        self._file.close()
        return status

    def tail(self, lines: int = 8) -> str:
        """The last lines of its log, for a message."""
        text = self.log.read_text("utf-8", "replace").strip().split("\n")[-lines:]
        return f"the end of {self.log}:\n  " + "\n  ".join(text)


def online(given: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Start the parts, watch them, stop them; returns the exit status.

    Raises:
      UserError: the config or a part is not as it should be.
      Stopped: this process was told to stop; the parts are stopped then.
    """
    notice = _Notice()
    config = with_fields(load_config(given.config), read_overrides(overrides))
    if config.game.name is not None:
        raise UserError(
            f"--config={given.config} plays {config.game.name!r} itself; oel online needs a config "
            "without an environment (config.game.name=None), which learns from conversations"
        )
    place = given.workdir / "online"
    games = place / "games.jsonl"
    learner = _Part("learner", _learner(given, overrides), place / "learner.log", shown=True)
    parts = [learner]
    try:
        _wait_for_config(given.workdir / "config.json", learner, notice)
        server = _Part("server", _server(given), place / "server.log")
        parts.append(server)
        url = server.wait_for_address(notice)
        print(f"server: {url}, log {server.log}", flush=True)
        players = _Part("players", _players(given, url, games), place / "players.log")
        parts.append(players)
        print(f"players: {given.players} at once, log {players.log}", flush=True)
        status = _watch(parts, learner, notice)
        if status:
            return status
        _let_them_play(parts, games, config.rounds, given.last_games, notice)
    finally:
        for part in reversed(parts):  # players first, so that the server sees no more requests
            part.stop()
    print(players.tail(1).partition("\n")[2].strip())
    print(summarise(games, place, rounds=config.rounds))
    return 0


def _wait_for_config(file: Path, learner: _Part, notice: _Notice) -> None:
    """Until the learner has written the config, by which the server knows its model and sizes.

    Raises:
      UserError: it ended before.
    """
    while not file.exists():
        notice.check()
        if learner.status is not None:
            raise UserError(f"the learner ended ({learner.status}); {learner.tail()}")
        time.sleep(0.2)


def _watch(parts: Sequence[_Part], learner: _Part, notice: _Notice) -> int:
    """Until the learner has ended; its status.

    Raises:
      UserError: another part ended before.
    """
    while learner.status is None:
        notice.check()
        for part in parts:
            if part is not learner and part.status is not None:
                raise UserError(f"the {part.name} ended ({part.status}); {part.tail()}")
        time.sleep(0.5)
    if learner.status:
        print(f"the learner ended with status {learner.status}", file=sys.stderr)
    return learner.status


def _let_them_play(
    parts: Sequence[_Part], games: Path, rounds: int, wanted: int, notice: _Notice
) -> None:
    """Until there are `wanted` games of the last policy alone.

    Raises:
      UserError: a part ended before.
    """
    last, shown, began = f"round_{rounds:03d}", 0.0, time.monotonic()
    while True:
        notice.check()
        done = sum(game["policies"] == [last] for game in played(games))
        if done >= wanted:
            return
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(
                f"players: {done}/{wanted} games with {last}, {duration(shown - began)} so far",
                flush=True,
            )
        for part in parts:
            if part.name != "learner" and part.status is not None:
                raise UserError(f"the {part.name} ended ({part.status}); {part.tail()}")
        time.sleep(1)


def _server(given: argparse.Namespace) -> list[str]:
    return ["oel_jax.serve", f"--workdir={given.workdir}", "--port=0"]


def _learner(given: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    return [
        "oel_jax.main",
        f"--config={given.config}",
        f"--workdir={given.workdir}",
        *overrides,
    ]


def _players(given: argparse.Namespace, url: str, games: Path) -> list[str]:
    return [
        "oel_jax.online.players",
        f"--url={url}",
        f"--out={games}",
        f"--players={given.players}",
        f"--game={given.game}",
        f"--pause={given.pause}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m oel_jax.online", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", required=True, help="FILE.py or a name in configs/")
    parser.add_argument("--workdir", type=paths.argument, required=True, help="of server and run")
    parser.add_argument("--players", type=int, default=32, help="games at once")
    parser.add_argument("--game", default="frozen_lake", help="what the players play")
    parser.add_argument(
        "--pause", type=float, default=1.5, help="seconds a player waits between two turns"
    )
    parser.add_argument(
        "--last_games", type=int, default=256, help="games with the last policy before the end"
    )
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        overrides, rest = split_overrides(arguments)
        return online(parser.parse_args(rest), overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except Stopped as stopped:
        print(
            "stopped, and all parts with it. The same command resumes from here.", file=sys.stderr
        )
        return stopped.status
