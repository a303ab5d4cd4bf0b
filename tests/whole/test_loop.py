"""The whole loop on a tiny scale: going on after a kill, subsets of stages, rounds, other games."""

import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest
from tiers import HANG
from tiny_run import ROOT, as_flags, contents, copy_of, go, opened, results, tiny_config

from oel_jax import environments
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.config.checks import validate
from oel_jax.data.trajectory_files import read
from oel_jax.export.command import export
from oel_jax.runs.policies import policy_directory
from oel_jax.runs.workdir import Workdir
from oel_jax.sampler.sampler import Sampler

# By name: the package's attributes `evaluate`, ... could be mistaken for the functions in them.
consolidate, deploy, evaluate, extract = (
    importlib.import_module(f"oel_jax.{name}")
    for name in ("learner.consolidate", "actor.deploy", "actor.evaluate", "learner.extract")
)


class Killed(BaseException):
    """Ends a run at once; nothing in the package catches it."""


def go_until(place, name, calls, workdir, config):
    """Run until `place.name` is called for the time after `calls`, and die there."""
    original, count = getattr(place, name), itertools.count()

    def dying(*args, **kwargs):
        if next(count) == calls:
            raise Killed
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place, name, dying)
        go(workdir, config)


def tear(path):
    """What a kill in the middle of a write leaves behind."""
    with path.open("ab") as file:
        file.write(b'{"schema": "oel.tr')


@pytest.mark.e2e
def test_a_run_killed_in_every_stage_equals_an_uninterrupted_one(finished_run, tmp_path):
    work, config = tmp_path / "run", tiny_config()
    first = work / "round_001"

    go_until(evaluate, "_record", 3, work, config)
    tear(work / "evaluate" / "start.games.jsonl")
    tear(work / "metrics.jsonl")
    go_until(deploy, "_trajectory", 3, work, config)
    tear(first / "trajectories" / "extract_0001.jsonl")
    go_until(deploy, "_trajectory", 6, work, config)
    tear(first / "trajectories" / "deploy_0001.jsonl")
    go_until(Workdir, "finish", 0, work, config)  # all is played and in the metrics
    go_until(extract, "write_json", 3, work, config)
    assert len(contents(first / "knowledge", "**/*.json")) == 3
    go_until(extract, "_log", 1, work, config)  # all texts are written, the last metrics are not
    assert len(contents(first / "knowledge", "**/*.json")) == 4
    go_until(consolidate, "update", 2, work, config)  # two of three steps, both saved
    assert not (first / "policy").exists()
    go_until(Workdir, "finish", 0, work, config)  # the policy is there, the manifest lacks it
    assert (first / "policy").exists()
    go_until(evaluate, "_record", 3, work, config)
    assert not (first / "evaluate" / "in_context.json").exists()
    go_until(evaluate, "write_json", 1, work, config)  # after the last game of the second part
    go_until(Workdir, "finish", 0, work, config)
    go(work, config)

    found, expected = results(work), results(finished_run)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


CHILD = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [{root!r}, {tests!r}]
import jax
jax.config.update("jax_num_cpu_devices", 8)
from pathlib import Path
import oel_jax.learner.consolidate as consolidate
from oel_jax.models import bundled
bundled.MODEL_DIR = Path({model!r})
import tiny_run
update, calls = consolidate.update, []
def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
        os._exit(9)  # as SIGKILL: no handler, no flush, no waiting for a checkpoint
    return update(*args, **kwargs)
consolidate.update = dying
tiny_run.go(Path(sys.argv[1]), tiny_run.tiny_config())
"""


@pytest.mark.e2e
def test_a_killed_process_goes_on_from_its_checkpoint(finished_run, tmp_path, capsys):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    tests = Path(__file__).resolve().parents[1]
    code = CHILD.format(
        root=str(tests.parent), tests=str(tests), model=str(tiny_config().model.path)
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(work)], capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 9, done.stderr
    go(work, tiny_config())
    assert "resuming from optimizer step" in capsys.readouterr().out
    assert results(work) == results(finished_run)


@pytest.mark.e2e
@pytest.mark.signals
def test_ctrl_c_says_how_to_resume(run_of_command, tmp_path):
    work = copy_of(run_of_command, tmp_path / "run", "consolidate", "evaluate")
    command = [sys.executable, "-u", "-m", "oel_jax.main", *as_flags(), f"--workdir={work}"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    for line in process.stdout:
        if "=== round 1" in line:  # seconds of work lie ahead, also where one core does all
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 130, errors
    last = errors.splitlines()[-1]
    assert last.startswith("stopped by Ctrl-C; ") and "kept. The same command resumes" in last
    assert "Traceback" not in errors


NOTICED = """
import os, runpy, signal, sys
import oel_jax.learner.consolidate as consolidate
update, calls = consolidate.update, []
def noticed(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), {signal})
    return update(*args, **kwargs)
consolidate.update = noticed
runpy.run_module("oel_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.e2e
@pytest.mark.signals
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_stopped_in_consolidation_it_resumes_at_that_step(run_of_command, tmp_path, number, status):
    """Not at the last multiple of `save_every`."""
    work = copy_of(run_of_command, tmp_path / "run", "consolidate", "evaluate")
    flags = [*as_flags(consolidate__save_every=1000), f"--workdir={work}", "--allow_config_change"]
    given = {"cwd": ROOT, "capture_output": True, "text": True}
    given["env"] = os.environ | {"JAX_PLATFORMS": "cpu"}
    code = NOTICED.format(signal=int(number))
    first = subprocess.run([sys.executable, "-c", code, *flags], **given)
    assert first.returncode == status, first.stderr
    assert "round 1: optimizer step 2 of 3 is kept" in first.stderr.splitlines()[-1]
    second = subprocess.run([sys.executable, "-m", "oel_jax.main", *flags], **given, check=True)
    assert "resuming from optimizer step 2" in second.stdout
    assert results(work) == results(run_of_command)


def test_a_finished_run_computes_nothing_again(finished_run, tmp_path, monkeypatch, capsys):
    work = copy_of(finished_run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    monkeypatch.setattr(Sampler, "poll", None)
    go(work, tiny_config())
    after = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert changed <= {"summary.json", "report.html", ".lock", "metrics.jsonl"}
    table = capsys.readouterr().out
    for words in ("before, without knowledge", "a random policy passes 1.69%, perfect play 100.0%"):
        assert words in table


def test_a_stage_that_lost_a_file_is_done_again_and_no_other(finished_run, tmp_path, capsys):
    work = copy_of(finished_run, tmp_path / "run")
    (work / "round_001" / "knowledge" / "chain_00" / "step_001.json").unlink()
    go(work, tiny_config())
    out = capsys.readouterr().out
    assert "round 1 extract: done" in out
    assert "deploy: done" not in out and "consolidate: done" not in out
    found, expected = results(work), results(finished_run)
    for rows in (found["metrics"], expected["metrics"]):  # the stage's rows are now the last ones
        rows.sort(key=str)
    assert found == expected


def test_a_stage_says_what_it_needs(finished_run, tmp_path, capsys):
    with pytest.raises(UserError, match="round 1: consolidate needs deploy and extract first"):
        go(tmp_path / "new", tiny_config(), ["consolidate"])
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    with pytest.raises(UserError, match="round 1: evaluate needs consolidate first"):
        go(work, tiny_config(), ["evaluate"])
    capsys.readouterr()
    # Deploy and extract of round 1 are as far as one gets; that is not all that was asked for.
    with pytest.raises(UserError, match="round 2: deploy needs consolidate of round 1 first"):
        go(work, tiny_config(rounds=2), ["deploy", "extract"])
    assert not (work / "round_002").exists()
    assert contents(work, "round_001/**/*") == contents(
        finished_run, "round_001/trajectories/*", "round_001/knowledge/**/*"
    )


def test_rounds_are_added_later_and_start_from_the_last_policy(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run")
    config = tiny_config(rounds=2)
    with opened(work, config) as run:
        assert policy_directory(run.config, run.workdir, 1) == Path(config.model.path)
        assert policy_directory(run.config, run.workdir, 2) == work / "round_001" / "policy"
    go(work, config, ["deploy"])
    assert contents(work, "round_001/**/*") == contents(finished_run, "round_001/**/*")
    played = read(work / "round_002" / "trajectories" / "deploy_0000.jsonl")
    assert {(game.policy, game.round) for game in played} == {("round_001", 2)}
    assert [game.seed for game in played] == environments.deploy_seeds(2, 1, 4)


def test_fewer_rounds_than_are_there_forget_nothing(finished_run, tmp_path, capsys):
    work = copy_of(finished_run, tmp_path / "run")
    two = work / "round_002"
    shutil.copytree(work / "round_001", two)  # a second round, as far as the record goes
    manifest = read_json(work / "manifest.json")
    text = json.dumps([entry for entry in manifest["stages"] if entry["round"]])
    second = json.loads(
        text.replace("round_001/", "round_002/").replace('"round": 1', '"round": 2')
    )
    manifest["stages"] += second
    write_json(work / "manifest.json", manifest)
    for asked in (2, 1):
        go(work, tiny_config(rounds=asked))
        summary = read_json(work / "summary.json")
        assert [entry["round"] for entry in summary["rounds"]] == [1, 2]
        assert read_json(work / "config.json")["rounds"] == 2
        said = "config.rounds=1, and this workdir has 2 rounds" in capsys.readouterr().out
        assert said == (asked == 1)
    assert read_json(work / "manifest.json")["config_changes"] == [
        {"at": ANY, "fields": {"rounds": {"old": 1, "new": 2}}}
    ]
    go(work, tiny_config(rounds=3), ["deploy"])  # and more of them still extend it
    assert read_json(work / "config.json")["rounds"] == 3


def test_the_table_tells_how_much_was_measured_not_how_much_is_configured(
    finished_run, tmp_path, capsys
):
    work = copy_of(finished_run, tmp_path / "run")
    go(work, tiny_config(evaluate__maps=2, evaluate__seeds=1), change=True)
    assert "4 held-out maps x 2 games each" in capsys.readouterr().out


def test_export_of_a_round_is_its_policy(finished_run, tmp_path):
    export(finished_run, 1, tmp_path / "out")
    policy = finished_run / "round_001" / "policy"
    assert contents(tmp_path / "out", "**/*") == contents(policy, "**/*")
    assert "model.safetensors" in contents(policy, "*")


def test_a_changed_config_is_refused_unless_allowed(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run")
    changed = tiny_config(consolidate__learning_rate=0.125, extract__n=1)
    with pytest.raises(UserError) as caught:
        go(work, changed)
    assert "config.consolidate.learning_rate: 0.0003 -> 0.125" in str(caught.value)
    assert "config.extract.n: 2 -> 1" in str(caught.value)
    assert results(work) == results(finished_run)
    go(work, changed, change=True)
    assert read_json(work / "config.json")["consolidate"]["learning_rate"] == 0.125
    assert results(work) == results(finished_run)  # finished stages stay as they are


def test_the_summary_has_the_documented_shape(finished_run):
    summary = read_json(finished_run / "summary.json")
    assert summary.keys() == {"start", "rounds", "gain_error"}
    (entry,) = summary["rounds"]
    assert entry.keys() == {"round", "in_context", "consolidated", "gain", "seconds"}
    assert entry["round"] == 1
    assert list(entry["seconds"]) == ["deploy", "extract", "consolidate", "evaluate"]
    places = {
        "evaluate/start": summary["start"],
        "round_001/evaluate/in_context": entry["in_context"],
        "round_001/evaluate/consolidated": entry["consolidated"],
    }
    for place, shown in places.items():
        assert shown.keys() == {"pass_rate", "ci95", "response_tokens"}
        full = read_json(finished_run / f"{place}.json")
        assert shown == {key: full[key] for key in shown}
        assert shown["ci95"][0] <= shown["pass_rate"] <= shown["ci95"][1]


def test_an_emptied_trajectory_file_is_played_again(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", "extract", "consolidate", "evaluate")
    path = work / "round_001" / "trajectories" / "deploy_0001.jsonl"
    path.write_bytes(b"")
    go(work, tiny_config(), ["deploy"])
    assert contents(work, "round_001/trajectories/*") == contents(
        finished_run, "round_001/trajectories/*"
    )


@pytest.mark.parametrize(
    "line, message",
    [
        (b"not json\n", "2: not JSON"),
        (b'{"schema": "oel.trajectory/9"}\n', "2: schema is 'oel.trajectory/9'"),
    ],
)
def test_a_damaged_line_stops_the_run_with_file_and_line(finished_run, tmp_path, line, message):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    path = work / "round_001" / "trajectories" / "deploy_0001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], line, *lines[2:]]))
    before = contents(work, "round_001/**/*")
    with pytest.raises(UserError) as caught:
        go(work, tiny_config())
    assert f"{path}:{message}" in str(caught.value)
    assert contents(work, "round_001/**/*") == before


class Cups:
    """A coin lies under one of two cups; a game as a user would write it."""

    name = "cups"

    def __init__(self, seed, layout="released"):
        self.seed, self.turns, self.passed = seed, 0, False
        self._news = "A coin lies under one of two cups. Answer [left] or [right]."
        self._history = self._news

    @property
    def done(self):
        return self.passed or self.turns == 2

    def situation(self):
        return self._history.strip() + "\n"

    def observation(self):
        return self._news

    def step(self, response):
        action = environments.parse_action(response)
        self.turns += 1
        self.passed = action == ("[left]", "[right]")[self.seed // 1000 % 2]
        self._news = f"{action} is empty."
        self._history += "\n" + self._news
        return action

    def outcome(self):
        return f"Summary:\nFinal Result: {'Success' if self.passed else 'Failure'}\n"

    def board_id(self):
        return str(self.seed // 1000 % 2)


@pytest.mark.e2e
@pytest.mark.parametrize("game", ["sokoban", "cups"])
def test_other_games_go_through_the_loop(tmp_path, game, capsys):
    if game == "cups":
        environments.register("cups", Cups)
    config = tiny_config(
        game__name=game,
        extract__version="v3",  # the nano model knows Frozen Lake: here any text will do
        extract__unfinished_thought="keep",
        consolidate__steps=1,
        evaluate__seeds=1,
        sampler__max_len=1536 if game == "sokoban" else 384,
    )
    validate(config, games=environments.names())
    go(tmp_path, config)
    assert (tmp_path / "round_001" / "policy" / "model.safetensors").exists()
    assert {
        game_.game for game_ in read(tmp_path / "round_001" / "trajectories" / "deploy_0000.jsonl")
    } == {game}
    result = read_json(tmp_path / "round_001" / "evaluate" / "consolidated.json")
    out = capsys.readouterr().out
    if game == "sokoban":
        assert result["perfect_play"] == 113 / 128
        assert "a random policy passes 16.40%, perfect play 88.3%" in out
        assert "4 maps not met in deployment" in out
    else:
        assert "random_policy" not in result and "a random policy" not in out
        assert "not met" not in out  # both boards were


def test_no_leftovers(finished_run):
    """Nothing temporary stays in a finished workdir."""
    names = {path.name for path in finished_run.rglob("*")}
    assert not [name for name in names if "tmp" in name or "partial" in name]
    assert not list(finished_run.rglob("*.games.jsonl"))
