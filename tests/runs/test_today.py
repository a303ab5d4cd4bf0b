"""A template that shows the date: one date for all prompts of a run, whatever the day and host."""

import datetime
import json
import shutil
import types
from pathlib import Path

import jax
import pytest
from tiny_run import copy_of, go, opened, policy_of, tiny_config

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.chat import template
from oel_jax.chat.render import render
from oel_jax.data.messages import Context
from oel_jax.data.trajectories import decision_points
from oel_jax.data.trajectory_files import read
from oel_jax.export import command as export
from oel_jax.models import bundled
from oel_jax.parallel import processes
from oel_jax.parallel.mesh import make_mesh
from oel_jax.runs import workdir
from oel_jax.runs.session import open_run
from oel_jax.runs.workdir import Workdir
from oel_jax.study import command as study

CONFIG = {"seed": 0}
FIRST = datetime.datetime(2026, 11, 28, 23, 58, 30)
LATER = FIRST + datetime.timedelta(days=3, hours=5)


@pytest.fixture
def clock(monkeypatch):
    """Sets what the time is: `clock(moment)`."""

    def set_to(moment: datetime.datetime) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return moment.replace(tzinfo=tz) if tz else moment

        module = types.SimpleNamespace(datetime=Clock, UTC=datetime.UTC)
        monkeypatch.setattr(workdir, "datetime", module)
        monkeypatch.setattr(template, "datetime", module)
        monkeypatch.setattr(study, "datetime", module)

    set_to(FIRST)
    return set_to


@pytest.fixture
def dated(tmp_path) -> Path:
    """The bundled model with a template that shows date and time."""
    directory = tmp_path / "model"
    shutil.copytree(bundled.MODEL_DIR, directory)
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    now = "{{- strftime_now('%d %b %Y %H:%M') + '<|im_end|>\\n' }}"
    file.write_text(json.dumps(config | {"chat_template": now + config["chat_template"]}))
    return directory


def test_the_start_of_a_run_is_recorded(tmp_path, clock):
    with Workdir(tmp_path / "run").open(CONFIG) as one:
        assert one.today == FIRST
    clock(LATER)
    with Workdir(tmp_path / "run").open(CONFIG) as one:
        assert one.today == FIRST
    assert Workdir(tmp_path / "run").today == FIRST
    assert read_json(tmp_path / "run" / "manifest.json")["today"] == "2026-11-28T23:58:30"
    with Workdir(tmp_path / "other").open(CONFIG, today=LATER) as one:
        assert one.today == LATER


def test_an_old_run_has_the_day_of_its_manifest(tmp_path, clock):
    with Workdir(tmp_path).open(CONFIG):
        pass
    manifest = read_json(tmp_path / "manifest.json")
    del manifest["today"]
    write_json(tmp_path / "manifest.json", manifest | {"created_at": "2026-03-02T12:00:00+00:00"})
    there = datetime.datetime(2026, 3, 2, 12, tzinfo=datetime.UTC).astimezone().replace(tzinfo=None)
    assert Workdir(tmp_path).today == there
    with Workdir(tmp_path).open(CONFIG) as one:
        assert one.today == there
    assert read_json(tmp_path / "manifest.json")["today"] == there.isoformat()
    for wrong in ({"today": "soon"}, {"today": 7}):
        write_json(tmp_path / "manifest.json", manifest | wrong)
        with pytest.raises(UserError, match="does not say when the run was started"):
            _ = Workdir(tmp_path).today


def test_all_runs_of_a_study_have_one_date(tmp_path, clock):
    """They share games, so that their prompts must not differ by the day."""
    root, made = tmp_path / "study", types.SimpleNamespace(name="s", preset="")
    with study._owned(root, made, []) as today:
        assert today == FIRST
    clock(LATER)
    with study._owned(root, made, []) as today:
        assert today == FIRST
    # Of an older version: the date of its first run.
    mark = read_json(root / "study.json")
    del mark["today"]
    write_json(root / "study.json", mark)
    runs = [types.SimpleNamespace(workdir=root / name) for name in ("a", "b", "not_begun")]
    for one, day in zip(runs, (LATER, FIRST + datetime.timedelta(days=1)), strict=False):
        with Workdir(one.workdir).open(CONFIG, today=day):
            pass
    with study._owned(root, made, runs) as today:
        assert today == FIRST + datetime.timedelta(days=1)
    assert read_json(root / "study.json")["today"] == "2026-11-29T23:58:30"


def test_all_prompts_of_a_run_have_its_date(tmp_path, clock, dated):
    config = tiny_config(model__path=str(dated), extract__model_path=str(dated))
    go(tmp_path / "run", config, ["deploy"])
    clock(LATER)
    with opened(tmp_path / "run", config) as run:
        player = policy_of(run, 1).tokenizer
        stored = decision_points(read(run.workdir.trajectories(1) / "deploy_0000.jsonl"))
        assert stored
        for point in stored:
            assert list(point.prompt_ids) == render(player, point.dialogue, thinking=True)
        teacher = policy_of(run, 1).tokenizer
        context = Context("knowledge", "x")
        shown = teacher.decode(render(teacher, stored[0].dialogue, context, thinking=True))
        assert shown.startswith("28 Nov 2026 23:58")
    # Without a run it is the day of loading, as in transformers.
    from oel_jax.models.language_model import load_model

    now = load_model(dated).tokenizer
    assert now.decode(now.chat("x", thinking=True)).startswith("02 Dec 2026 04:58")


def test_other_processes_take_the_date_of_the_first(tmp_path, clock, monkeypatch):
    with opened(tmp_path / "run", tiny_config()) as run:
        mesh = run.mesh
        assert run.today == FIRST
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "from_first", lambda value: LATER.isoformat())
    with open_run(tiny_config(), tmp_path / "not there", mesh) as other:
        assert other.today == LATER
    assert not (tmp_path / "not there").exists()  # process 0 makes it


def test_the_harness_shows_the_date_of_the_run(tmp_path, clock, dated, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is an optional extra")
    from oel_jax.evaluate import command as command

    config = tiny_config(model__path=str(dated))
    with opened(tmp_path / "run", config):
        pass
    clock(LATER)
    seen = []
    monkeypatch.setattr(command, "_evaluate", lambda *given: seen.append(given[-1].tokenizer))
    one = types.SimpleNamespace(name="t", settings={"chat_template": True}, most_new=1)
    command.evaluate_policies(tmp_path / "run", [one], mesh=make_mesh(1, 1, jax.devices()[:1]))
    (tokenizer,) = seen
    assert tokenizer.decode(tokenizer.chat("x", thinking=False)).startswith("28 Nov 2026 23:58")


def test_an_exported_model_says_so(tmp_path, clock, dated, finished_run, capsys):
    work = copy_of(finished_run, tmp_path / "run")
    shutil.copy(dated / "tokenizer_config.json", work / "round_001" / "policy")
    assert not export.shows_date(bundled.MODEL_DIR)
    assert export.main([f"--workdir={work}", "--round=1", f"--out={tmp_path / 'out'}"]) == 0
    day = f"{Workdir(work).today:%d %b %Y}"
    assert f"shows the date of the day; in this run it was {day}" in capsys.readouterr().out
