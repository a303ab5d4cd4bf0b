"""How long the import of logs takes, and how much memory.

    python -m benchmarks.logs [--conversations=10000,100000]

Writes seeded logs in all formats (every fourth conversation turn by turn, as a gateway does, each
request with all that came before), with addresses, numbers and keys in them, and runs
`oel logs import` on them in a process of its own: its seconds and its peak memory, for each number
of conversations. The bars: 100,000 conversations within 60 seconds, and ten times the conversations
with the same memory, but for a fifth. The import is one thread that hardly waits for the disk, so
the bar is on seconds of processor time, which other work on the machine changes least; seconds on
the clock are recorded with them.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import side_by_side
from benchmarks.side_by_side import Bar

ROOT = Path(__file__).resolve().parents[1]
_WORDS = (
    "the order of my account was late and they said it would arrive on Monday but nothing came so "
    "please tell me what to do about this because we need the invoice for our office today thank "
    "you very much here is a short list with steps first open settings then choose update and wait "
    "until it has finished after that restart everything if this does not help write again"
).split()
_PRIVATE = (
    "jane.doe@example.org", "+44 20 7946 0958", "4111 1111 1111 1111", "192.168.14.7",
    "sk-abcdefghijklmnop1234", "on 2024-01-31 at 12:30", "for $1,234.56", "v1.2.3",
)  # fmt: skip


def _text(rng: random.Random, words: int) -> str:
    begin = rng.randrange(len(_WORDS))
    text = " ".join(_WORDS[(begin + i * 7) % len(_WORDS)] for i in range(words))
    return f"{text} {rng.choice(_PRIVATE)}." if rng.random() < 0.2 else f"{text}."


def conversation(rng: random.Random, number: int) -> list[dict[str, str]]:
    """Messages of a conversation of 1 to 5 answers, no two alike."""
    messages = []
    for turn in range(rng.randint(1, 5)):
        question = f"{number}.{turn} {_text(rng, rng.randint(8, 40))}"
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": _text(rng, rng.randint(20, 120))})
    return messages


def records(rng: random.Random, number: int) -> Iterator[dict[str, Any]]:
    """The records of a conversation, in one of four formats."""
    messages, user = conversation(rng, number), f"user-{rng.randrange(20_000)}"
    if number % 4 == 0:
        for at in range(1, len(messages), 2):
            response = {"id": f"r{number}.{at}", "choices": [{"message": messages[at]}]}
            yield {"request": {"messages": messages[:at], "user": user}, "response": response}
    elif number % 4 == 1:
        yield {"messages": messages, "user": user, "feedback": _text(rng, 8), "rating": 4}
    elif number % 4 == 2:
        said = [
            {"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]}
            for m in messages
        ]
        yield {"id": f"s{number}", "conversations": said}
    else:
        yield {"conversation_id": f"c{number}", "hashed_ip": user, "conversation": messages}


def write_logs(path: Path, number: int, seed: int = 0) -> int:
    """Write the records of `number` conversations; returns the bytes."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for one in range(number):
            for record in records(rng, one):
                file.write(json.dumps(record) + "\n")
    return path.stat().st_size


def run_import(logs: Path, workdir: Path) -> dict[str, Any]:
    """Import in a process of its own: processor and clock seconds, peak bytes, its report."""
    words = ["import", str(logs), f"--workdir={workdir}", "--json"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "oel_jax.logs", *words], cwd=ROOT, stdout=subprocess.PIPE
    )
    report = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"oel logs import failed with status {status}")
    return {
        "seconds": usage.ru_utime + usage.ru_stime,
        "clock": time.perf_counter() - began,
        "peak": usage.ru_maxrss * 1024,
        "report": json.loads(report),
    }


def main() -> int:
    """Measure each number of conversations; returns the exit status."""
    options = side_by_side.parser(__doc__)
    options.add_argument("--conversations", default="10000,100000")
    given = options.parse_args()
    numbers = [int(part) for part in given.conversations.split(",")]
    measured, rows = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch) / "logs.jsonl"
        for number in numbers:
            size = write_logs(logs, number)
            runs = [
                run_import(logs, Path(scratch) / f"workdir_{number}_{repeat}")
                for repeat in range(given.repeats)
            ]
            found = runs[0]["report"]
            if found["conversations"] != number or found["skipped"]:
                raise RuntimeError(f"{number} conversations were written, {found} was read")
            measured[number] = {
                "log_bytes": size,
                "answers": found["turns"],
                "redacted": found["redacted"],
                "processor_seconds": [run["seconds"] for run in runs],
                "clock_seconds": [run["clock"] for run in runs],
                "peak_bytes": [run["peak"] for run in runs],
            }
            seconds = sorted(run["seconds"] for run in runs)
            clock = statistics.median(run["clock"] for run in runs)
            peak = max(run["peak"] for run in runs)
            rows.append(
                [
                    f"{number:,}",
                    f"{size / 1e6:.0f} MB",
                    f"{found['turns']:,}",
                    f"{statistics.median(seconds):.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})",
                    f"{clock:.1f}",
                    f"{peak / 2**20:.0f} MiB",
                ]
            )
    most, least = measured[numbers[-1]], measured[numbers[0]]
    real = numbers[-1] >= 100_000
    ratio = max(most["peak_bytes"]) / max(least["peak_bytes"])
    bars = [
        Bar(
            f"import of {numbers[-1]:,} conversations, processor seconds",
            statistics.median(most["processor_seconds"]),
            60.0 if real else None,
            most=True,
        ),
        Bar(
            f"peak memory of the import, {numbers[-1]:,} / {numbers[0]:,} conversations",
            ratio,
            1.2 if real else None,
            most=True,
        ),
    ]
    headers = ["conversations", "logs", "answers", "processor s", "clock s", "peak memory"]
    settings = {"conversations": given.conversations}
    return side_by_side.finish("logs", settings, rows, headers, bars, {"sizes": measured}, given)


if __name__ == "__main__":
    sys.exit(main())
