"""Simulated users of a served policy: a population that plays a text game over HTTP.

    python -m oel_jax.online.players --url=http://127.0.0.1:8000 --out=games.jsonl

Each player asks the endpoint for its next action, as any client of the API does, and says in words
what followed (`POST /v1/feedback`). The board, the rules and who has won are in this process alone:
a game that was won is counted here, for the plot, and is told to nobody.

A request that the server refuses for now (429, 503) or that meets a closed connection is sent again
after a pause; how often that happened is counted. One line of `--out` is one finished game.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from oel_jax import environments
from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.data import prompts

AGAIN = (429, 502, 503, 504)  # statuses after which the same request may succeed
PATIENCE = 120.0  # seconds for which a request is sent again
LONGEST_ANSWER = 300.0  # seconds to wait for one answer


class Reply(NamedTuple):
    """An answer of the endpoint: its id, its text, and the name of the policy that gave it."""

    id: str
    text: str
    policy: str


@dataclass
class Counts:
    """What happened to the requests of a population."""

    requests: int = 0
    repeated: int = 0  # sent again after a refusal or a closed connection
    dropped: int = 0  # never answered
    reasons: dict[str, int] = field(default_factory=dict)

    def repeat(self, reason: str) -> None:
        self.repeated += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


class Endpoint:
    """The three calls that a player makes, over one pool of connections."""

    def __init__(self, url: str, connections: int, key: str | None = None):
        import httpx

        self._httpx = httpx
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/"), headers=headers, limits=limits, timeout=LONGEST_ANSWER
        )
        self.counts = Counts()

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def answer(self, message: str, conversation: str, user: str, **settings: Any) -> Reply:
        """Ask for one answer to one user message.

        Raises:
          UserError: the server refuses the request for good, or did not answer in time.
        """
        body = {
            "model": "policy",
            "messages": [{"role": "user", "content": message}],
            "user": user,
            "metadata": {"conversation": conversation},
            **settings,
        }
        found = await self._post("/v1/chat/completions", body)
        text = found["choices"][0]["message"]["content"] or ""
        return Reply(found["id"], text, found["model"])

    async def say(self, reply: Reply, text: str, user: str) -> None:
        """Tell the server in words what followed an answer. Raises UserError as `answer` does."""
        await self._post("/v1/feedback", {"id": reply.id, "text": text, "user": user})

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self.counts.requests += 1
        start, pause, reason = time.monotonic(), 0.1, ""
        while time.monotonic() - start < PATIENCE:
            try:
                response = await self._client.post(path, json=body)
            except self._httpx.TransportError as error:
                reason = type(error).__name__
            else:
                if response.status_code == 200:
                    return response.json()
                reason = f"HTTP {response.status_code}"
                if response.status_code not in AGAIN:
                    self.counts.dropped += 1
                    raise UserError(f"{path}: {reason}: {response.text[:300]}")
                pause = _asked_pause(response.headers.get("Retry-After"), pause)
            self.counts.repeat(reason)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)
        self.counts.dropped += 1
        raise UserError(
            f"{path}: no answer within {PATIENCE:.0f} s ({reason}); is the server still running?"
        )


def _asked_pause(header: str | None, otherwise: float) -> float:
    try:
        return min(max(float(header or ""), 0.05), 30.0)
    except ValueError:
        return otherwise


# --- playing --------------------------------------------------------------------------------------


def seeds_of(player: int, players: int, first: int = 0) -> Iterator[int]:
    """Boards of one player, none of them held out and none of another player's."""
    number, size = first, 1
    while True:
        place = number * players + player
        # A round of the seed formula has room for 9,999 boards before the next one's begin.
        yield environments.deploy_seeds(1 + place // 9_000, 1 + place % 9_000, size)[0]
        number += 1


async def play_game(
    endpoint: Endpoint, given: argparse.Namespace, seed: int, conversation: str, user: str
) -> dict[str, Any]:
    """Play one game; returns its record."""
    # TextArena holds the interpreter for milliseconds: no thread is worth it.
    game = environments.make(given.game, seed, given.layout)
    began, policies, texts = time.time(), [], 0
    while not game.done:
        message = prompts.play_prompt(game.situation(), wrapper=given.wrapper)
        settings = {"temperature": given.temperature, "max_tokens": given.max_tokens}
        reply = await endpoint.answer(message, conversation, user, **settings)
        policies.append(reply.policy)
        texts += len(reply.text)
        game.step(reply.text)
        await endpoint.say(reply, game.outcome() if game.done else game.observation(), user)
        if given.pause:
            await asyncio.sleep(given.pause)
    return {
        "conversation": conversation,
        "user": user,
        "seed": seed,
        "board": game.board_id(),
        "policy": policies[-1],
        "policies": list(dict.fromkeys(policies)),
        "turns": game.turns,
        "characters": texts,
        "passed": game.passed,
        "began": began,
        "ended": time.time(),
    }


async def _player(
    endpoint: Endpoint,
    given: argparse.Namespace,
    number: int,
    out: Any,
    stop: asyncio.Event,
    left: "_Left",
) -> None:
    user = f"player_{number:03d}"
    for count, seed in enumerate(seeds_of(number, given.players, given.first)):
        if stop.is_set() or not left.take():
            return
        conversation = f"{user}_game_{given.first + count:05d}"
        record = await play_game(endpoint, given, seed, conversation, user)
        out.write(json.dumps(record) + "\n")
        out.flush()
        left.finish(record)


class _Left:
    """How many games there may still be, and a line on the console now and then."""

    def __init__(self, games: int, every: float):
        self._games, self._every = games, every
        self._begun = self._ended = 0
        self._shown = time.monotonic()
        self._recent: list[bool] = []

    def take(self) -> bool:
        self._begun += 1
        return not self._games or self._begun <= self._games

    def finish(self, record: dict[str, Any]) -> None:
        self._ended += 1
        self._recent = [*self._recent[-199:], record["passed"]]
        if time.monotonic() - self._shown >= self._every:
            self._shown = time.monotonic()
            rate = sum(self._recent) / len(self._recent)
            of = f"/{self._games}" if self._games else ""
            print(
                f"players: {self._ended}{of} games, of the last {len(self._recent)} "
                f"{rate:.1%} won, policy {record['policy']}",
                flush=True,
            )


async def play_all(given: argparse.Namespace) -> Counts:
    """Play until `--games` are finished or a signal comes; games under way are finished then.

    Raises:
      UserError: a request was refused for good, or never answered.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    left = _Left(given.games, given.every)
    async with Endpoint(given.url, given.players, os.environ.get("OEL_API_KEY")) as endpoint:
        with open(given.out, "a", encoding="utf-8") as out:
            players = [
                asyncio.create_task(_player(endpoint, given, number, out, stop, left))
                for number in range(given.players)
            ]
            try:
                await asyncio.gather(*players)
            finally:
                for task in players:
                    task.cancel()
                await asyncio.gather(*players, return_exceptions=True)
        return endpoint.counts


def games_played(file: Path) -> int:
    """Games per player that the file already has, so that a second start plays other boards."""
    most = -1
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                most = max(most, int(json.loads(line)["conversation"].rpartition("_")[2]))
            except (ValueError, KeyError, TypeError):  # a line that a kill has cut
                continue
    return most + 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m oel_jax.online.players", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--url", required=True, help="of the endpoint, http://HOST:PORT")
    parser.add_argument("--out", type=paths.argument, required=True, help="one line per game")
    parser.add_argument("--players", type=int, default=32, help="games at once")
    parser.add_argument("--games", type=int, default=0, help="in all; 0: until a signal comes")
    parser.add_argument("--game", default="frozen_lake", help="name of the game")
    parser.add_argument("--layout", default="released", choices=environments.LAYOUTS)
    parser.add_argument("--wrapper", default="grid", choices=sorted(prompts.WRAPPERS))
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max_tokens", type=int, default=48)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two turns")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two lines")
    given = parser.parse_args(arguments)
    given.first = games_played(given.out)
    try:
        counts = asyncio.run(play_all(given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    why = ", ".join(f"{reason} {count} x" for reason, count in sorted(counts.reasons.items()))
    print(
        f"players: {counts.requests} requests, {counts.dropped} never answered, "
        f"{counts.repeated} sent again" + (f" ({why})" if why else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
