"""Trajectory files: schema, bad input, crashes (spec 7; design, sections 3 and 8)."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from oel_jax.data import trajectories
from oel_jax.data.trajectories import Trajectory, TrajectoryWriter, Turn
from oel_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def make_turn(**changes):
    values = {
        "prompt": "board <|im_end|> √\u2028\x00",
        "prompt_ids": [1, 2, 3],
        "response": 'I "go"\n[right]',
        "response_ids": [4, 5],
        "action": "[right]",
        "observation": "",
    }
    return Turn(**{**values, **changes})


def make_game(seed=7, turns=None, **changes):
    values = {
        "game": "frozen_lake",
        "seed": seed,
        "policy": "round_001",
        "round": 1,
        "purpose": "deploy",
        "chain": None,
        "step": 3,
        "turns": [make_turn(), make_turn(prompt="later")] if turns is None else turns,
        "outcome": "Summary:\n",
    }
    return Trajectory(**{**values, **changes})


def record(**changes):
    """A good line as plain JSON data, with top-level changes (None of them by default)."""
    game = make_game()
    data = {"schema": trajectories.SCHEMA, **dataclasses.asdict(game)}
    return {**data, **changes}


def turn_record(**changes):
    return record(turns=[{**dataclasses.asdict(make_turn()), **changes}])


def write(path, *games):
    with TrajectoryWriter(path) as writer:
        for game in games:
            writer.write(game)
    return path


# --- round trip and order -------------------------------------------------------------------------


def test_round_trip(tmp_path):
    games = [
        make_game(1),
        make_game(2, purpose="extract", chain=50, step=None),
        make_game(2**63 - 1, turns=[make_turn(response="", response_ids=[], action="")]),
    ]
    path = write(tmp_path / "a.jsonl", *games)
    assert trajectories.read(path) == sorted(games, key=lambda g: (g.step or -1, g.seed))
    assert path.read_bytes().count(b"\n") == 3


def test_write_line_is_what_the_writer_writes(tmp_path):
    with open(tmp_path / "plain.jsonl", "wb") as file:
        trajectories.write_line(file, make_game())
    write(tmp_path / "a.jsonl", make_game())
    assert (tmp_path / "plain.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    assert json.loads((tmp_path / "a.jsonl").read_text())["schema"] == "oel.trajectory/1"


def test_numpy_ids_become_integers(tmp_path):
    turn = make_turn(prompt_ids=np.arange(3, dtype=np.int32), response_ids=np.array([2**31 - 1]))
    (game,) = trajectories.read(write(tmp_path / "a.jsonl", make_game(turns=[turn])))
    assert game.turns[0].prompt_ids == (0, 1, 2) and game.turns[0].response_ids == (2**31 - 1,)
    with pytest.raises(TypeError):
        make_turn(prompt_ids=[1.0])


def test_reading_order_does_not_depend_on_finishing_order(tmp_path):
    games = [make_game(seed, step=step) for step in (1, 2) for seed in (3, 10, 20)]
    path = write(tmp_path / "a.jsonl", *games[::-1])
    assert trajectories.read(path) == games


def test_prefixes_are_ordered_by_game_then_turn():
    games = [make_game(9), make_game(1, turns=[make_turn(prompt="only", prompt_ids=[8])])]
    assert [(p.prompt, p.prompt_ids, p.game, p.turn) for p in trajectories.prefixes(games)] == [
        (games[0].turns[0].prompt, (1, 2, 3), 0, 0),
        ("later", (1, 2, 3), 0, 1),
        ("only", (8,), 1, 0),
    ]
    assert trajectories.prefixes([]) == []


# --- bad lines ------------------------------------------------------------------------------------

BAD = {
    "not JSON": (b"{nope}", "not JSON"),
    "blank line": (b"", "not JSON"),
    "not UTF-8": (json.dumps(record()).encode()[:-1] + b"\xff}", "not UTF-8"),
    "not an object": (b"[1]", "must be a JSON object"),
    "wrong schema": (record(schema="oel.trajectory/2"), "schema is 'oel.trajectory/2', .*reads"),
    "no schema": ({"game": "x"}, "schema is None"),
    "reward": (record(reward=1.0), "unknown key 'reward'; trajectories carry no rewards"),
    "reward in a turn": (turn_record(reward=0), r"turns\[0\] has the unknown key 'reward'"),
    "missing key": ({k: v for k, v in record().items() if k != "outcome"}, "lacks .*'outcome'"),
    "doubled key": (b'{"seed": 1,' + json.dumps(record()).encode()[1:], "'seed' occurs twice"),
    "NaN": (json.dumps(record(seed=float("nan"))).encode(), "NaN"),
    "float overflow": (
        json.dumps(record()).encode().replace(b'"seed": 7', b'"seed": 1e999'),
        "seed must be an integer",
    ),
    "float seed": (record(seed=7.0), "seed must be an integer"),
    "negative seed": (record(seed=-1), "seed must be an integer"),
    "boolean round": (record(round=True), "round must be an integer"),
    "round 0": (record(round=0), "round must be an integer"),
    "null round": (record(round=None), "round must be an integer"),
    "huge integer": (
        json.dumps(record()).encode().replace(b'"seed": 7', b'"seed": ' + b"9" * 5000),
        "a number is too large",
    ),
    "large integer": (record(seed=10**40), "seed must be .*more than 20 digits"),
    "string step": (record(step="3"), "step must be an integer .*or null, got '3'"),
    "purpose": (record(purpose="eval"), "purpose must be one of extract, deploy"),
    "unhashable purpose": (record(purpose=["deploy"]), "purpose must be one of"),
    "empty game": (record(game=""), "game must not be empty"),
    "number as outcome": (record(outcome=1.0), "outcome must be a string"),
    "no turns": (record(turns=[]), "at least one turn"),
    "turns as object": (record(turns={"0": {}}), "turns must be a list"),
    "turn as string": (record(turns=["x"]), r"turns\[0\] must be a JSON object"),
    "empty prompt": (turn_record(prompt=""), r"turns\[0\].prompt must not be empty"),
    "null response": (turn_record(response=None), r"turns\[0\].response must be a string"),
    "no prompt ids": (turn_record(prompt_ids=[]), r"prompt_ids must not be empty"),
    "ids as string": (turn_record(response_ids="12"), "response_ids must be a list"),
    "float id": (turn_record(prompt_ids=[1, 2.0]), r"prompt_ids\[1\] must be an integer"),
    "boolean id": (turn_record(prompt_ids=[True]), r"prompt_ids\[0\] must be an integer"),
    "id too large": (turn_record(response_ids=[0, 2**31]), r"response_ids\[1\] must be"),
    "lone surrogate": (turn_record(response="\ud800"), "half a surrogate"),
    "deep nesting": (b'{"schema":' + b"[" * 200_000, "nested far deeper|not JSON"),
    "same game again": (record(seed=1), "the game of line 1 again"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_reported_and_can_be_skipped(tmp_path, caplog, name):
    bad, message = BAD[name]
    bad = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    path = write(tmp_path / "games.jsonl", make_game(1))
    good = path.read_bytes()
    other = write(tmp_path / "other.jsonl", make_game(2)).read_bytes()
    path.write_bytes(good + bad + b"\n" + other)
    with pytest.raises(UserError, match=rf"games\.jsonl:2: .*({message}).*; ") as caught:
        trajectories.read(path)
    assert len(str(caught.value)) < 500
    if name != "same game again":
        with pytest.raises(UserError, match=r"games\.jsonl:2: "):
            TrajectoryWriter(path)
    assert path.read_bytes() == good + bad + b"\n" + other  # nothing already written is lost
    with caplog.at_level(logging.WARNING):
        assert [game.seed for game in trajectories.read(path, on_bad="skip")] == [1, 2]
    assert "games.jsonl:2: skipped" in caplog.text and "skipped 1 of 3 lines" in caplog.text


def test_useless_files(tmp_path):
    path = tmp_path / "games.jsonl"
    with pytest.raises(UserError, match="games.jsonl cannot be read: No such file"):
        trajectories.read(path)
    path.write_bytes(b"")
    for on_bad in ("error", "skip"):
        with pytest.raises(UserError, match="games.jsonl is empty"):
            trajectories.read(path, on_bad=on_bad)
    path.write_bytes(b"x\ny\n")
    with pytest.raises(UserError, match="no good line .2 skipped"):
        trajectories.read(path, on_bad="skip")
    with pytest.raises(UserError, match="on_bad"):
        trajectories.read(path, on_bad="ignore")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        trajectories.read(tmp_path)


# --- the writer -----------------------------------------------------------------------------------


def test_every_torn_end_is_cut_off_and_the_game_played_again(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", make_game(1), make_game(2))
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        with TrajectoryWriter(path) as writer:
            assert [game.seed for game in writer.finished] == [1]
            assert path.read_bytes() == whole[:start]
            writer.write(make_game(2))
        assert path.read_bytes() == whole
    assert "a.jsonl:2: cut off a damaged last line" in caplog.text


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"{garbage}\n", b"\xff\xfe", b'{"schema"'])
def test_other_damaged_last_lines(tmp_path, tail):
    path = write(tmp_path / "a.jsonl", make_game(1))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with pytest.raises(UserError, match=r"a\.jsonl:2: "):
        trajectories.read(path)
    TrajectoryWriter(path).close()
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-30])
    with TrajectoryWriter(path) as writer:
        assert writer.finished == [] and path.read_bytes() == b""


def test_a_complete_last_line_only_lacks_its_newline(tmp_path):
    path = write(tmp_path / "a.jsonl", make_game(1), make_game(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert len(trajectories.read(path)) == 2
    with TrajectoryWriter(path) as writer:
        assert len(writer.finished) == 2
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        json.dumps(record(schema="oel.trajectory/9")).encode() + b"\n",
        json.dumps(record(reward=1)).encode() + b"\n",
        b"a text of somebody else's",
    ],
)
def test_a_last_line_that_no_crash_explains_is_kept_and_reported(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    with pytest.raises(UserError, match=r"a\.jsonl:1: "):
        TrajectoryWriter(path)
    assert path.read_bytes() == line


def test_the_writer_refuses_what_readers_would_refuse(tmp_path):
    path = tmp_path / "a.jsonl"
    with TrajectoryWriter(path) as writer:
        writer.write(make_game(1))
        before = path.read_bytes()
        assert before.endswith(b"\n")  # on disk at once, not at close
        for bad in (
            make_game(1),
            make_game(-2),
            make_game(2, turns=[]),
            make_game(2, outcome=None),
            make_game(2, turns=[make_turn(prompt="\udfff")]),
            make_game(2, turns=[make_turn(prompt_ids=[2**31])]),
        ):
            with pytest.raises(ValueError):
                writer.write(bad)
        assert path.read_bytes() == before
        writer.write(make_game(1, step=4))  # the same board in another step is another game
    assert len(trajectories.read(path)) == 2
    with pytest.raises(ValueError, match="holds the game"), TrajectoryWriter(path) as writer:
        writer.write(make_game(1))


def test_unwritable_places_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="cannot be written: No such file"):
        TrajectoryWriter(tmp_path / "missing" / "a.jsonl")
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        TrajectoryWriter(tmp_path)
    with pytest.raises(ValueError, match="sync_every"):
        TrajectoryWriter(tmp_path / "a.jsonl", sync_every=0)


def run_python(code, *arguments):
    program = "from tests.data.test_trajectories import *\n" + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_killed_process_loses_no_finished_game(tmp_path):
    path = tmp_path / "a.jsonl"
    done = run_python(
        """
        writer = TrajectoryWriter(sys.argv[1], sync_every=1000)
        for seed in range(50):
            writer.write(make_game(seed))
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
    )
    assert done.returncode == -signal.SIGKILL
    assert [game.seed for game in trajectories.read(path)] == list(range(50))


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """A file size limit stands for the full disk: the failing write is a partial one."""
    path = write(tmp_path / "a.jsonl", make_game(0))
    line = os.path.getsize(path)
    done = run_python(
        """
        import resource
        limit = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with TrajectoryWriter(sys.argv[1]) as writer:
            for seed in range(1, 9):
                try:
                    writer.write(make_game(seed))
                except UserError as error:
                    sys.exit(f"{seed}: {error}")
        """,
        path,
        line * 3 + line // 2,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"3: cannot write to {path}: File too large; make room")
    assert os.path.getsize(path) == line * 3
    assert [game.seed for game in trajectories.read(path)] == [0, 1, 2]
