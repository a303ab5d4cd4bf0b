"""Skills that OEL never trains: what is measured, where it is kept, and who is refused."""

import numpy as np
import pytest
from conftest import write_model
from tiny_run import copy_of, go, opened, tiny_config

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.models import bundled
from oel_jax.models.huggingface import save_model
from oel_jax.models.language_model import load_model
from oel_jax.nano import skills
from oel_jax.parallel.mesh import make_mesh
from oel_jax.runs.metrics import read_metrics


@pytest.fixture(autouse=True)
def few_games(monkeypatch):
    monkeypatch.setattr(skills, "BOARDS", 6)
    monkeypatch.setattr(skills, "SEEDS", 1)


@pytest.mark.nano
def test_skills_before_and_after_a_round(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", "evaluate")
    manifest = read_json(work / "manifest.json")
    manifest["stages"] = [entry for entry in manifest["stages"] if entry["round"]]
    write_json(work / "manifest.json", manifest)
    go(work, tiny_config(evaluate__skills=True), change=True)
    start = read_json(work / "evaluate" / "start_skills.json")
    after = read_json(work / "round_001" / "evaluate" / "skills.json")
    names = {
        "sokoban: gold",
        "frozen_lake: other worlds, gold",
        "frozen_lake: swapped world, gold",
        "instructions",
    }
    for number, found in enumerate((start, after)):
        assert set(found["skills"]) == names
        rates = [one["rate"] for one in found["skills"].values()]
        assert found["skill"] == pytest.approx(np.mean(rates))
        low, high = found["ci95"]
        assert low <= found["skill"] <= high
        row = next(
            r
            for r in read_metrics(work / "metrics.jsonl")
            if (r["stage"], r["round"]) == ("evaluate_skills", number)
        )
        assert row["values"]["skill"] == found["skill"]
    assert start["skills"]["instructions"]["n"] == 50
    assert start["skill"] > 0.6  # the bundled model can do these things
    with opened(work, tiny_config(evaluate__skills=True)) as run:  # the manifest covers the files
        assert run.workdir.finished(0, "evaluate") and run.workdir.finished(1, "evaluate")
        run.workdir.verify(1, "evaluate")
        (work / "round_001" / "evaluate" / "skills.json").unlink()
        assert not run.workdir.finished(1, "evaluate")


@pytest.mark.nano
def test_a_ruined_model_has_lost_them(finished_run, tmp_path):
    model = load_model(bundled.MODEL_DIR, dtype="float32", mesh=make_mesh())
    ruined = {name: leaf * 0.3 for name, leaf in model.params.items() if not isinstance(leaf, dict)}
    ruined = model.params | ruined
    save_model(tmp_path / "ruined", model.cfg, ruined, source=bundled.MODEL_DIR, dtype="float32")
    config = tiny_config(evaluate__skills=True)
    found = skills.evaluate_skills(config, tmp_path / "ruined", tmp_path / "skills.json")
    assert found["skill"] < 0.5


def test_who_is_refused(tmp_path):
    other = write_model(tmp_path / "other", "qwen3")
    with pytest.raises(UserError, match=r"config\.evaluate\.skills needs a nano model .*lm_eval"):
        skills.check_skills(tiny_config(evaluate__skills=True, model__path=str(other)))
    with pytest.raises(UserError, match=r"config\.game\.name='chess' set it to False"):
        skills.check_skills(tiny_config(evaluate__skills=True, game__name="chess"))
    skills.check_skills(tiny_config(model__path=str(other)))  # not asked for
