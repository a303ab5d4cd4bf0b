"""A server under load that is killed: is a line lost that a client saw finished?

    python -m benchmarks.serve_load [--requests=1000] [--connections=64] [--cancelled=0.05]

Starts `oel serve`, sends requests over so many connections at once, half of them streamed, closes
some connections in the middle of an answer, ends the server with SIGKILL when half of all answers
are there, starts it again on the same store and port, and continues. Clients send a request again
that met a closed connection or a server that was not there. After that, every line of the store
must be whole, and every answer that a client saw the end of must be in it, once. Memory is the
server's resident set, sampled while it answers; it is compared between the second tenth of the
samples after the restart and their last tenth, when everything is compiled.
"""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import side_by_side
from benchmarks.side_by_side import Bar, finish
from oel_jax.base.errors import UserError
from oel_jax.data.conversations import ConversationStore

_ADDRESS = re.compile(r"serving\s+(http://[\w.:]+)/v1")
_START_SECONDS = 300.0


class Server:
    """`oel serve` as a process; it can be killed and started again at the same port."""

    def __init__(self, store: Path, model: str, slots: int):
        self.store, self.model, self.slots = store, model, slots
        self.port, self.process, self.starts = 0, None, 0

    def start(self) -> str:
        """Start it; returns its URL when it answers."""
        flags = [f"--model={self.model}", f"--workdir={self.store}", f"--port={self.port}"]
        flags += [f"--slots={self.slots}", "--max_prompt=256", "--max_response=64"]
        log = open(self.store / f"server_{self.starts}.log", "w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "oel_jax.serve", *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=Path(__file__).resolve().parent.parent,
        )
        self.starts += 1
        began = time.monotonic()
        while time.monotonic() - began < _START_SECONDS:
            found = _ADDRESS.search(self.process.stdout.readline())
            if found:
                self.port = int(found[1].rpartition(":")[2])
                while "recorded" not in self.process.stdout.readline():
                    pass
                return found[1]
            if self.process.poll() is not None:
                raise RuntimeError(f"the server did not start; see {log.name}")
        raise RuntimeError("the server did not start in time")

    def kill(self) -> None:
        """SIGKILL: nothing of it can tidy up."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def resident(self) -> int | None:
        """Bytes of its resident set; None where that cannot be known."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return None
        return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Seen:
    """What the clients saw.

    Attributes:
      finished: ids of answers whose end a client saw; cancelled: of those whose client left.
      malformed: answers that were not as they should be.
      memory: (finished answers, bytes) of the server that was started last.
    """

    finished: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[int, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


async def _one(client: Any, url: str, number: int, leave: bool, seen: Seen) -> bool:
    """One request; whether it is done with, be it well or badly."""
    import httpx

    body = {
        "model": "policy",
        "messages": [{"role": "user", "content": f"Question {number}: what is two plus three?"}],
        "max_tokens": 48 if leave else 8 + number % 25,
        "seed": number,
        "user": f"user {number % 50}",
        "stream": leave or number % 2 == 0,
    }
    try:
        if not body["stream"]:
            response = await client.post(f"{url}/v1/chat/completions", json=body)
            seen.statuses[str(response.status_code)] += 1
            if response.status_code != 200:
                return False
            made = response.json()
            if made["choices"][0]["finish_reason"] not in ("stop", "length"):
                seen.malformed.append(made["id"])
            seen.finished.append(made["id"])
            return True
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            seen.statuses[str(response.status_code)] += 1
            if response.status_code != 200:
                return False
            return await _read_stream(response, leave, seen)
    except httpx.TransportError as error:
        seen.statuses[type(error).__name__] += 1
        return False


async def _read_stream(response: Any, leave: bool, seen: Seen) -> bool:
    name, end = "", None
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            (seen.finished if end in ("stop", "length") else seen.malformed).append(name)
            return True
        if line:
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                seen.statuses[str(event["error"]["code"])] += 1
                return False
            name, choice = event["id"], event["choices"][0]
            end = choice["finish_reason"] or end
            if leave and choice["delta"].get("content"):
                seen.cancelled.append(name)
                return True
    return False


async def _load(server: Server, url: str, options: Any, seen: Seen) -> None:
    import httpx

    draw = random.Random(options.seed)
    leaves = {n for n in range(options.requests) if draw.random() < options.cancelled}
    queue = list(range(options.requests))[::-1]
    down = asyncio.Event()

    async def work(client: Any) -> None:
        while queue:
            number, began = queue.pop(), time.monotonic()
            while not await _one(client, url, number, number in leaves, seen):
                await asyncio.sleep(0.1 * (1 + draw.random()))
            seen.seconds.append(time.monotonic() - began)
            size = server.resident()
            if size and down.is_set():
                seen.memory.append((len(seen.seconds), size))

    async def kill() -> None:
        while len(seen.seconds) < options.requests // 2:
            await asyncio.sleep(0.01)
        server.kill()
        await asyncio.to_thread(server.start)
        down.set()

    limits = httpx.Limits(max_connections=options.connections)
    async with httpx.AsyncClient(limits=limits, timeout=300) as client:
        workers = [work(client) for _ in range(options.connections)]
        await asyncio.gather(kill(), *workers)


def check_store(store: ConversationStore, seen: Seen) -> dict[str, int]:
    """What is in the store against what the clients saw."""
    ids: Counter[str] = Counter()
    torn = 0
    for file in store.files("exchanges"):
        for line in file.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
                ids[record["id"]] += line.endswith(b"\n")
            except (ValueError, KeyError):
                torn += 1
    return {
        "lines": ids.total(),
        "lost": sum(one not in ids for one in seen.finished),
        "twice": sum(count > 1 for count in ids.values()),
        "torn": torn,
        "conversations": sum(1 for _ in store.read(on_bad="error")),
    }


def memory_growth(memory: list[tuple[int, int]]) -> float:
    """How much larger the server is in the last tenth of its samples than in the second tenth."""
    sizes = [size for _, size in memory]
    tenth = max(1, len(sizes) // 10)
    early, late = sizes[tenth : 2 * tenth] or sizes[:1], sizes[-tenth:]
    return (sum(late) / len(late)) / (sum(early) / len(early))


def measure(options: Any, workdir: Path) -> dict[str, Any]:
    """The whole of it; returns what was seen."""
    server, seen = Server(workdir, options.model, options.slots), Seen()
    url, began = server.start(), time.monotonic()
    try:
        asyncio.run(_load(server, url, options, seen))
        status = server.stop()
    finally:
        if server.process.poll() is None:
            server.kill()
    found: dict[str, Any] = check_store(ConversationStore(workdir / "conversations"), seen)
    found |= {
        "finished": len(seen.finished),
        "left": len(seen.cancelled),
        "malformed": len(seen.malformed),
        "statuses": dict(seen.statuses),
        "memory_growth": memory_growth(seen.memory) if seen.memory else None,
        "memory_mib": max((size for _, size in seen.memory), default=0) / 2**20,
        "exit_status": status,
        "seconds": time.monotonic() - began,
        "p50_seconds": sorted(seen.seconds)[len(seen.seconds) // 2],
        "p99_seconds": sorted(seen.seconds)[int(len(seen.seconds) * 0.99)],
    }
    return found


def main() -> int:
    """Command line; returns the exit status."""
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", default="nano:tiny")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--cancelled", type=float, default=0.05, help="share of clients that leave")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    bars = [
        Bar("lines lost that a client saw finished", found["lost"], 0, True),
        Bar("torn lines", found["torn"], 0, True),
        Bar("lines that are there twice", found["twice"], 0, True),
        Bar("malformed answers", found["malformed"], 0, True),
        Bar("memory late / early", found["memory_growth"] or 1.0, 1.05, True),
    ]
    names = ("model", "requests", "connections", "cancelled", "slots")
    settings = {name: getattr(options, name) for name in names}
    rows = [[name, value] for name, value in found.items() if name != "statuses"]
    return finish(
        "serve_load", settings, rows, ["what", "value"], bars, {"measured": found}, options
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
