"""Many clients at once: the engine against transformers with the same weights and prompts.

    python -m benchmarks.serve_engine --model=DIR [--clients=16] [--prompt=300] [--answer=128]

Each client sends `turns` chat requests one after the other, temperature 0, and reads the whole
answer. All prompts are different and have `prompt` tokens; `--system` of them are the same in all,
as a system prompt is. Peers: `transformers serve` over HTTP as it is started by default, and
`generate` on a batch of all clients' prompts, padded on the left, which waits for the longest
answer. Compared are generated tokens per second; end tokens count on all sides. On a machine
that others use too, the processor seconds per token of each side are the steadier measure.
"""

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import side_by_side
from benchmarks.side_by_side import Bar, finish, race, ratio, spread
from oel_jax.base import paths
from oel_jax.chat.render import render
from oel_jax.chat.tokenizer import Tokenizer
from oel_jax.data.messages import Dialogue, Message, user
from oel_jax.models.language_model import LanguageModel, load_model
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.serve.engine import Engine, serving_sizes

WORDS = (
    "river stone window garden letter market winter evening bridge teacher animal number corner "
    "island kitchen music paper silver travel yellow village weather morning people answer story "
    "question simple often before because always around under better little every other where"
).split()


def talk(tokenizer: Tokenizer, number: int, prompt: int, shared: int) -> list[Message]:
    """A conversation whose rendered prompt has about `prompt` tokens; `shared` begin all."""

    def text(seed: int, tokens: int) -> str:
        words = np.random.default_rng(seed).choice(WORDS, 2 * tokens)
        ids = tokenizer.encode(" ".join(words))[:tokens]
        return tokenizer.decode(ids).strip()

    system: list[Message] = [{"role": "system", "content": text(0, shared)}] if shared else []
    whole = [*system, user("x")]
    rest = prompt - len(render(tokenizer, Dialogue(tuple(whole)), thinking=False)) - 8
    ask = f"Tell a long story with these words: {text(1 + number, max(8, rest))}"
    return [*system, user(ask)]


class Side:
    """A way to answer; counts what it generated in the last call."""

    def __init__(self, talks: Sequence[Sequence[list[Message]]], answer: int):
        self.talks, self.answer = talks, answer  # by client, then turn
        self.tokens: list[int] = []
        self.first: list[float] = []  # seconds to the first token

    def processor_seconds(self) -> float:
        """Used so far by the process that answers."""
        return time.process_time()


class Ours(Side):
    """The engine, read by one asyncio task for each client."""

    def __init__(self, model: LanguageModel, talks, answer: int, prompt: int):
        super().__init__(talks, answer)
        self.prompts = [
            [render(model.tokenizer, Dialogue(tuple(one)), thinking=False) for one in some]
            for some in talks
        ]
        sizes = serving_sizes(slots=len(talks), length=prompt + 64 + answer, response=answer)
        self.engine = Engine(model, "start", sizes, sampling=Sampling(0.0))

    def warm_up(self) -> None:
        """Compile what is needed."""
        self.engine.warm_up()

    def __call__(self) -> None:
        self.engine._sampler.forget()  # as if no prompt had been seen before
        self.tokens, self.first = [], []
        asyncio.run(self._all())

    async def _all(self) -> None:
        await asyncio.gather(*map(self._client, self.prompts))

    async def _client(self, prompts: list[list[int]]) -> None:
        for prompt in prompts:
            answer = self.engine.submit(Request(prompt, request_key("bench"), self.answer))
            await answer.whole()
            assert answer.finish in ("stop", "length"), answer.reason
            self.tokens.append(answer.generated)
            self.first.append(answer.first - answer.queued)


class Batched(Side):
    """`generate`, all clients of a turn in one batch."""

    def __init__(self, directory: Path, prompts, answer: int, stop_ids: Sequence[int]):
        super().__init__(prompts, answer)
        import torch
        import transformers

        self.torch, self.stop_ids = torch, list(stop_ids)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ).eval()

    def warm_up(self) -> None:
        self._generate([some[0][:20] for some in self.talks][:2])

    def __call__(self) -> None:
        self.tokens = []
        for turn in range(len(self.talks[0])):
            self._generate([some[turn] for some in self.talks])

    def _generate(self, prompts: list[list[int]]) -> None:
        torch, width = self.torch, max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.no_grad():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=self.answer,
                eos_token_id=self.stop_ids,
                pad_token_id=0,
            )[:, width:]
        for row in out.tolist():
            ends = [i + 1 for i, token in enumerate(row) if token in self.stop_ids]
            self.tokens.append(ends[0] if ends else len(row))


class Served(Side):
    """`transformers serve`, one HTTP client in a thread for each client."""

    def __init__(self, directory: Path, talks, answer: int, log: Path, flags: Sequence[str] = ()):
        super().__init__(talks, answer)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.directory = str(directory)
        command = [str(Path(sys.executable).parent / "transformers"), "serve", self.directory]
        command += ["--port", str(self.port), "--host", "127.0.0.1", "--device", "cpu"]
        command += ["--dtype", "float32", *flags]
        self.process = subprocess.Popen(
            command,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        for _ in range(600):
            try:
                self._get("/health")
                return
            except OSError:
                if self.process.poll() is not None:
                    raise RuntimeError(f"transformers serve ended: see {log}") from None
                time.sleep(0.5)
        raise RuntimeError(f"transformers serve does not answer: see {log}")

    def processor_seconds(self) -> float:
        """Of the server's process, threads included."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()

    def warm_up(self) -> None:
        self._ask(self.talks[0][0], 4)

    def __call__(self) -> None:
        self.tokens = []
        with ThreadPoolExecutor(len(self.talks)) as clients:
            for _ in clients.map(self._client, self.talks):
                pass

    def _client(self, talks: list[list[Message]]) -> None:
        for one in talks:
            self.tokens.append(self._ask(one, self.answer))

    def _ask(self, messages: list[Message], answer: int) -> int:
        body = {
            "model": self.directory,
            "messages": messages,
            "max_tokens": answer,
            "temperature": 0,
            "stream": False,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=3600) as reply:
            return json.loads(reply.read())["usage"]["completion_tokens"]

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as reply:
            return reply.read()


def measured(side: Side, notes: dict[str, list[float]]) -> Callable[[], None]:
    """The side with what it does noted."""

    def call() -> None:
        began, used = time.perf_counter(), side.processor_seconds()
        side()
        tokens = sum(side.tokens)
        notes["tokens"].append(tokens)
        notes["rate"].append(tokens / (time.perf_counter() - began))
        notes["processor"].append((side.processor_seconds() - used) / tokens)
        print(f"  {tokens} tokens, {1000 * notes['processor'][-1]:.0f} processor ms each")

    call.warm_up = getattr(side, "warm_up", call)  # type: ignore[attr-defined]
    return call


def main() -> int:
    """Run it."""
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", required=True, help="directory of a chat model")
    for name, value in (
        ("clients", 16),
        ("prompt", 300),
        ("answer", 128),
        ("turns", 2),
        ("system", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--serve_clients",
        type=int,
        default=0,
        help="fewer clients for transformers serve, which answers one after the other: its rate is "
        "the same, and is measured sooner; 0: all",
    )
    parser.add_argument("--peers", default="batched,serve", help="of batched, serve")
    options = parser.parse_args()
    directory = Path(paths.local(options.model, "--model"))
    model = load_model(directory)
    talks = [
        [
            talk(model.tokenizer, client * options.turns + turn, options.prompt, options.system)
            for turn in range(options.turns)
        ]
        for client in range(options.clients)
    ]
    ours = Ours(model, talks, options.answer, options.prompt)
    sides: dict[str, Side] = {"ours": ours}
    peers = options.peers.split(",")
    if "batched" in peers:
        stops = model.tokenizer.stop_ids
        sides["batched generate"] = Batched(directory, ours.prompts, options.answer, stops)
    served = None
    if "serve" in peers:
        log = Path(options.out) / "transformers_serve.log"
        few = talks[: options.serve_clients or None]
        sides["transformers serve"] = served = Served(directory, few, options.answer, log)
    notes = {name: {"tokens": [], "rate": [], "processor": []} for name in sides}
    try:
        seconds = race(
            {name: measured(side, notes[name]) for name, side in sides.items()}, options.repeats
        )
    finally:
        ours.engine.close()
        if served is not None:
            served.close()
    kept = {
        name: {key: values[-options.repeats :] for key, values in some.items()}
        for name, some in notes.items()
    }
    mine, peers = kept["ours"], [name for name in sides if name != "ours"]
    rates = {name: ratio(mine["rate"], kept[name]["rate"]) for name in peers}
    costs = {name: ratio(kept[name]["processor"], mine["processor"]) for name in peers}
    rows = [
        [
            name,
            f"{statistics.median(some['rate']):.1f}",
            f"{1000 * statistics.median(some['processor']):.0f}",
            some["tokens"][-1],
            spread(rates[name]) if name in rates else "",
            spread(costs[name]) if name in costs else "",
        ]
        for name, some in kept.items()
    ]
    names = ("clients", "serve_clients", "prompt", "answer", "turns", "system")
    return finish(
        "serve_engine",
        {"model": directory.name, **{name: getattr(options, name) for name in names}},
        rows,
        [
            "side",
            "tok/s",
            "processor ms/token",
            "tokens",
            "tok/s, ours / it",
            "processor, it / ours",
        ],
        [Bar(f"tok/s, ours / {name}", some[0], 3.0) for name, some in rates.items()]
        + [Bar(f"processor time, {name} / ours", some[0], None) for name, some in costs.items()],
        {
            "seconds": seconds,
            "notes": kept,
            "ratio": rates,
            "processor_ratio": costs,
            "first_token_seconds": statistics.median(ours.first),
        },
        options,
    )


if __name__ == "__main__":
    sys.exit(main())
