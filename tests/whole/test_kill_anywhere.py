"""A short version of kill_anywhere.py: it finds what differs, and a killed run does not."""

import json
import shutil

import pytest
from kill_anywhere import Interrupted, differences, where
from tiny_run import FIELDS, NANO_CONFIG

from oel_jax.models import bundled


@pytest.mark.e2e
@pytest.mark.signals
def test_a_killed_run_ends_as_one_left_alone(run_of_command, tmp_path):
    settings = FIELDS | {"model.path": str(bundled.MODEL_DIR)}
    interrupted = Interrupted(NANO_CONFIG, settings, longest=12.0, seed=3)
    assert interrupted.finish(tmp_path / "run", kills=2) >= 1
    assert differences(run_of_command, tmp_path / "run") == []
    assert sum(interrupted.hit.values()) >= 1


def spoil_trajectory(work):
    path = work / "round_001" / "trajectories" / "deploy_0000.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def spoil_policy(work):
    path = work / "round_001" / "policy" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def spoil_metrics(work):
    path = work / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    next(row for row in rows if "loss" in row["values"])["values"]["loss"] += 1e-7
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lose_knowledge(work):
    (work / "round_001" / "knowledge" / "chain_01" / "step_002.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "file"),
    [
        (spoil_trajectory, "round_001/trajectories/deploy_0000.jsonl"),
        (spoil_policy, "round_001/policy/model.safetensors"),
        (spoil_metrics, "metrics.jsonl"),
        (lose_knowledge, "round_001/knowledge/chain_01/step_002.json"),
    ],
)
def test_it_sees_what_differs(finished_run, tmp_path, spoil, file):
    work = tmp_path / "run"
    shutil.copytree(finished_run, work)
    assert differences(finished_run, work) == []
    spoil(work)
    assert differences(finished_run, work) == [file]


def test_the_clock_does_not_count(finished_run, tmp_path):
    work = tmp_path / "run"
    shutil.copytree(finished_run, work)
    manifest = json.loads((work / "manifest.json").read_text())
    for stage in manifest["stages"]:
        stage["seconds"] += 1
    (work / "manifest.json").write_text(json.dumps(manifest))
    lines = (work / "metrics.jsonl").read_text().splitlines(keepends=True)
    (work / "metrics.jsonl").write_text("".join(reversed(lines)))
    assert differences(finished_run, work) == []


def test_where_a_run_was():
    lines = "start\nround 1 deploy for prefixes: 3/8 games\nround 1 consolidate: 1/3 steps"
    assert where(lines) == "consolidate" and where("hello") == "starting up"
