"""`oel online`: server, learner and players as processes that share a workdir and nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiers import HANG

ROOT = Path(__file__).resolve().parents[2]

# A round of seconds: the numbers that matter are those of the default config.
SMALL = {
    "rounds": 1,
    "logs.wait": 24,
    "logs.idle": 1.0,
    "logs.heldout": 0.2,
    "sampler.slots": 8,
    "sampler.prefill_rows": 8,
    "deploy.games_per_step": 4,
    "extract.chains": 1,
    "extract.n": 2,
    "extract.n_run": 2,
    "extract.user_share": 1.0,
    "consolidate.steps": 2,
    "consolidate.token_budget": 1024,
    "evaluate.conversations": 2,
}


def start(workdir, *more):
    command = [sys.executable, "-m", "oel_jax", "online", "--config=nano_frozen_lake_online"]
    command += [f"--workdir={workdir}", "--players=8", "--pause=0", "--last_games=8", *more]
    command += [f"--config.{name}={value}" for name, value in SMALL.items()]
    cache = os.environ["OEL_TEST_XLA_CACHE"]
    command += [f"--config.compilation_cache={cache}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def running(workdir):
    """Processes that name the workdir in their command."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = place.read_bytes()
        except OSError:
            continue
        if str(workdir).encode() in text:
            found.append(text)
    return found


@pytest.mark.e2e
def test_players_a_server_and_a_learner_close_the_loop(tmp_path):
    workdir = tmp_path / "run"
    # Told to stop while the players play: all parts end, and the same command resumes.
    process = start(workdir)
    games = workdir / "online" / "games.jsonl"
    end = time.monotonic() + HANG
    while not (games.exists() and games.stat().st_size) and time.monotonic() < end:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 75 and "The same command resumes" in output, output
    assert not running(workdir)
    before = len(games.read_text().splitlines())

    process = start(workdir)
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0, output + (workdir / "online" / "server.log").read_text()
    assert not running(workdir)

    # No request was dropped, at the swap either; no board was played twice.
    assert ", 0 never answered" in output
    played = [json.loads(line) for line in games.read_text().splitlines()]
    assert len(played) > before
    assert len({game["seed"] for game in played}) == len(played)
    assert {game["policy"] for game in played} == {"round_000", "round_001"}
    summary = json.loads((workdir / "online" / "summary.json").read_text())
    assert summary["policies"]["round_001"]["games"] >= 8

    # All that the learner had are conversations, and none of them tells who has won.
    stored = b"".join(p.read_bytes() for p in (workdir / "conversations").glob("*.jsonl"))
    assert b'"passed"' not in stored and b"board_id" not in stored
    made = json.loads((workdir / "round_001" / "trajectories" / "snapshot.json").read_text())
    assert made["train"] >= 8 and (workdir / "report.html").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=nano_frozen_lake"], "config.game.name=None"),
        (["--config=no_such_config"], "no_such_config"),
    ],
)
def test_refusals(tmp_path, flags, message, capsys):
    from oel_jax.online.command import main

    assert main([*flags, f"--workdir={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
