"""Recording of games without a model: what is played, where it goes, and what a kill leaves."""

import itertools
from types import SimpleNamespace

import pytest

from oel_jax.actor import recording
from oel_jax.actor.play import Job
from oel_jax.actor.recording import Format, GameFile, read_records, record_games, remove_records
from oel_jax.base.errors import UserError
from oel_jax.data.line_files import encode_json
from oel_jax.parallel import processes


@pytest.fixture
def played(monkeypatch):
    """Jobs in the order in which they are played: from the last to the first."""
    seen = []

    def play(player, jobs, progress):
        for job in reversed(list(jobs)):
            seen.append(job.seed)
            yield SimpleNamespace(job=job)

    monkeypatch.setattr(recording, "play", play)
    return seen


def form_of(record=lambda game: {"seed": game.job.seed}):
    return Format(record, lambda one: [one["seed"]], lambda job: [job.seed])


def files_of(place, *counts):
    seeds = iter(range(100))
    return [
        GameFile(place / f"f{n}.jsonl", [Job(next(seeds), ()) for _ in range(count)])
        for n, count in enumerate(counts)
    ]


def seeds_in(files):
    return [[one["seed"] for one in read_records(file, form_of())] for file in files]


def record(files, form=None):
    asked = []
    record_games(files, form or form_of(), asked.append, "x", 0.0)
    return asked


def test_files_are_filled_in_the_order_of_the_jobs(tmp_path, played):
    files = files_of(tmp_path / "new", 3, 1)
    assert record(files) == [4]
    assert seeds_in(files) == [[0, 1, 2], [3]] and played == [3, 2, 1, 0]
    assert record(files) == [] and len(played) == 4  # nothing to play, no player is made
    remove_records(files[0].path)
    assert not files[0].path.exists() and files[1].path.exists()


@pytest.mark.parametrize("kill", range(5))
def test_a_kill_at_any_game_plays_nothing_twice(tmp_path, played, kill):
    files, count = files_of(tmp_path, 2, 3), itertools.count()

    def dying(game):
        if next(count) == kill:
            raise KeyboardInterrupt
        return {"seed": game.job.seed}

    with pytest.raises(KeyboardInterrupt):
        record(files, form_of(dying))
    path = files[0].path if kill < 2 else files[1].path
    with path.open("ab") as file:
        file.write(b'{"se')  # in the middle of a write
    played.clear()
    assert record(files) == [5]  # the player is as large as at the first time
    assert sorted(played) == list(range(kill, 5))
    assert seeds_in(files) == [[0, 1], [2, 3, 4]]


def test_parts_of_several_processes_are_put_together(tmp_path, played, monkeypatch):
    """What processes 0 and 1 had played when they were killed, and what was merged before."""
    files = files_of(tmp_path, 4, 2)
    for name, seeds in {
        "f0": [2],
        "f0.process_000": [0],
        "f0.process_001": [3, 99],  # 99 is no game that is due
        "f1.process_001": [5],
    }.items():
        lines = [encode_json({"seed": seed}) for seed in seeds]
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(lines))
    assert record(files) == [6]
    assert sorted(played) == [1, 4]
    assert seeds_in(files) == [[0, 1, 2, 3], [4, 5]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f0.jsonl", "f1.jsonl"]


def test_each_process_has_files_for_itself(tmp_path, played, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "index", lambda: 1)
    monkeypatch.setattr(processes, "first_does", lambda name, work: None)
    monkeypatch.setattr(processes, "from_first", lambda value: [[[1]], []])  # 1 is there
    monkeypatch.setattr(processes, "wait", lambda name: None)
    files = files_of(tmp_path, 3, 2)
    assert record(files) == [3]  # of 5 games in 2 processes
    names = {"f0.process_001.jsonl": [2], "f1.process_001.jsonl": [4]}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        name: b"".join(encode_json({"seed": seed}) for seed in seeds)
        for name, seeds in names.items()
    }


def test_a_damaged_line_in_the_middle_is_named(tmp_path, played):
    files = files_of(tmp_path, 2)
    files[0].path.write_bytes(b'{"seed": 0}\n{]\n{"seed": 1}\n')
    with pytest.raises(UserError, match=r"f0\.jsonl:2: not JSON"):
        record(files)
    assert not played
