"""Checkpoints inside a round: whole or absent, bounded, and readable on other devices."""

import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import copy_of, go, results, tiny_config

from oel_jax import run
from oel_jax.base import preemption
from oel_jax.base.errors import UserError
from oel_jax.learner import consolidate as stage
from oel_jax.learner import rollouts
from oel_jax.parallel.mesh import make_mesh, spec
from oel_jax.runs import checkpoints
from oel_jax.runs.checkpoints import RoundCheckpoints
from oel_jax.runs.metrics import read_metrics


def opened(directory, every=1, minutes=None, keep=1):
    return RoundCheckpoints(directory, every=every, minutes=minutes, keep=keep)


def tree(devices, value=0.0, rows=16):
    """Arrays split over so many devices, with numbers that tell where they stand."""
    mesh = make_mesh(devices, 1, jax.devices()[:devices])
    place = jax.sharding.NamedSharding(mesh, spec("vocab", "embed"))
    whole = np.arange(rows * 8, dtype=np.float32).reshape(rows, 8) + value
    return {"params": jax.device_put(whole, place), "count": jnp.int32(value)}


def test_restored_on_fewer_and_on_more_devices(tmp_path):
    written = tree(8, 5.0)
    with opened(tmp_path / "c") as kept:
        kept.save(3, written)
    for devices in (4, 1, 8, 2):
        with opened(tmp_path / "c") as kept:
            like = tree(devices)
            found = kept.restore(kept.steps[-1], like)
        assert found["params"].sharding == like["params"].sharding
        np.testing.assert_array_equal(found["params"], written["params"])
        assert int(found["count"]) == 5


def test_only_the_newest_stay(tmp_path):
    with opened(tmp_path / "c", keep=2) as kept:
        for step in (1, 2, 3):
            kept.save(step, tree(1, step))
            kept.wait()
        assert kept.steps == [2, 3]
        kept.drop_after(2)
        assert kept.steps == [2]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2"]


def test_a_half_written_one_is_none(tmp_path):
    with opened(tmp_path / "c") as kept:
        kept.save(1, tree(1))
    half = tmp_path / "c" / "2.orbax-checkpoint-tmp-7"
    shutil.copytree(tmp_path / "c" / "1", half)
    (half / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
    with opened(tmp_path / "c") as kept:
        assert kept.steps == [1]
        kept.restore(1, tree(1))
    assert not half.exists()


def test_when_one_is_due(tmp_path, monkeypatch):
    with opened(tmp_path / "c", every=4) as kept:
        assert [kept.due(step) for step in range(1, 9)] == [step % 4 == 0 for step in range(1, 9)]
    with opened(tmp_path / "d", every=1000, minutes=10) as kept:
        assert not kept.due(1)
        now = checkpoints.time.monotonic()
        monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now + 601)
        assert kept.due(1)
        kept.save(1, tree(1))
        assert not kept.due(2)


def test_another_model_is_refused(tmp_path):
    with opened(tmp_path / "c") as kept:
        kept.save(1, tree(1))
        kept.wait()
        with pytest.raises(UserError, match=r"c/1 cannot be restored: .*another model or config"):
            kept.restore(1, tree(1, rows=32))
        with pytest.raises(UserError, match="cannot be restored"):
            kept.restore(1, tree(1) | {"more": jnp.zeros(3)})


def test_a_full_disk_leaves_the_last_one(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with opened(tmp_path / "c") as kept:
        kept.save(1, tree(1, 1.0))
        kept.wait()
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage(9, 9, 100))
        with pytest.raises(
            UserError,
            match="checkpoint of step 2 cannot be written: it needs .*step 1 is kept.*free",
        ):
            kept.save(2, tree(1, 2.0))
        monkeypatch.undo()
        found = kept.restore(1, tree(1))
        assert int(found["count"]) == 1
        kept.save(2, tree(1, 2.0))


# --- in a run -------------------------------------------------------------------------------------


def noticed_after(monkeypatch, calls):
    """A notice that comes when it has been asked for so many times."""
    left = iter(range(calls))
    monkeypatch.setattr(preemption, "noticed", lambda: next(left, None) is None)


def noticed_in(monkeypatch, owner, name, call):
    """A notice that comes while `owner.name` is called for the `call`-th time."""
    real, made = getattr(owner, name), []

    def noted(*arguments, **more):
        made.append(1)
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, noted)
    monkeypatch.setattr(preemption, "noticed", lambda: len(made) >= call)


# Where the notice of the second step comes, and the step that is then on disk.
PLACES = {
    "rollouts": (rollouts, "_own_answers", 2, "1"),
    "micro-batches": (stage, "_program", 0, "1"),
    "update": (stage, "update", 2, "2"),
}


@pytest.mark.e2e
@pytest.mark.signals
@pytest.mark.parametrize("place, save_every", [(p, 1000) for p in PLACES] + [("update", 1)])
def test_a_notice_saves_the_step_and_the_run_goes_on_the_same(
    finished_run, tmp_path, monkeypatch, place, save_every
):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    config = tiny_config(consolidate__save_every=save_every)
    owner, name, call, kept = PLACES[place]
    if not call:  # in the second step: after the micro-batches of the first one
        rows = [
            r for r in read_metrics(finished_run / "metrics.jsonl") if r["stage"] == "consolidate"
        ]
        call = int(rows[0]["values"]["micro_batches"]) + 1
    noticed_in(monkeypatch, owner, name, call)
    with pytest.raises(preemption.Preempted, match=f"step {kept} of 3 is kept"):
        go(work, config)
    assert [path.name for path in (work / "round_001" / "consolidate").iterdir()] == [kept]
    monkeypatch.undo()
    go(work, config)
    assert results(work) == results(finished_run)
    assert not (work / "round_001" / "consolidate").exists()  # nothing resumes from there


def test_a_notice_during_games_loses_none(finished_run, tmp_path, monkeypatch):
    work = tmp_path / "run"
    noticed_after(monkeypatch, 12)
    with pytest.raises(preemption.Preempted):
        go(work, tiny_config())
    monkeypatch.undo()
    go(work, tiny_config())
    assert results(work) == results(finished_run)


@pytest.mark.e2e
def test_a_round_goes_on_with_other_devices(finished_run, tmp_path, monkeypatch):
    """Eight devices for the first step, four for the second, one for the last."""
    from safetensors.numpy import load_file

    made = {}
    for name, meshes in {"one": (1, 1, 1), "fewer": (8, 4, 1)}.items():
        work = made[name] = copy_of(finished_run, tmp_path / name, "consolidate", "evaluate")
        for step, devices in enumerate(meshes, start=1):
            settings = {"mesh__fsdp": devices, "consolidate__keep_fp32_master": True}
            config = tiny_config(consolidate__learning_rate=5e-6, **settings)
            given = {"allow_config_change": True, "devices": jax.devices()[:devices]}
            if step < len(meshes):
                noticed_in(monkeypatch, stage, "update", 1)
                with pytest.raises(preemption.Preempted):
                    run(config, work, ["consolidate"], **given)
            else:
                run(config, work, ["consolidate"], **given)
            monkeypatch.undo()
    one, fewer = (
        load_file(work / "round_001" / "policy" / "model.safetensors") for work in made.values()
    )
    for name, value in one.items():
        np.testing.assert_allclose(value, fewer[name], atol=1e-5, err_msg=name)
