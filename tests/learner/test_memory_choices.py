"""Settings that change where and how weights and moments are kept, through real stages."""

import importlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_run import copy_of, go, interrupt_consolidation, tiny_config

from oel_jax.base.errors import UserError
from oel_jax.config.checks import validate
from oel_jax.models import bundled
from oel_jax.parallel.mesh import make_mesh
from oel_jax.parallel.offload import check_offload
from oel_jax.runs.metrics import read_metrics
from oel_jax.runs.policies import check_model

module = importlib.import_module("oel_jax.learner.consolidate")
BF16 = dict(model__dtype="bfloat16")
ALL = ("optimizer", "masters", "teacher")


def consolidated(finished_run, work, **changes):
    """The finished run's games, consolidated with these settings; the policy's bytes."""
    copy_of(finished_run, work, "consolidate", "evaluate")
    go(work, tiny_config(**changes), ["consolidate"], change=True)
    return policy(work)


def policy(work):
    return (work / "round_001" / "policy" / "model.safetensors").read_bytes()


def losses(work):
    rows = [r for r in read_metrics(work / "metrics.jsonl") if r["stage"] == "consolidate"]
    return np.array([row["values"]["loss"] for row in rows])


@pytest.fixture(scope="module")
def plain(finished_run, tmp_path_factory):
    work = tmp_path_factory.mktemp("plain") / "run"
    consolidated(finished_run, work, **BF16)
    return work


@pytest.fixture
def kinds(monkeypatch):
    """Memory kinds of (moments, masters, teacher) at the start of each step's rollouts."""
    seen, rollouts = [], module.student_samples
    current = {}
    step = module._step

    def watched_step(this, student):
        current["student"] = student
        return step(this, student)

    def watched(config, number, episodes, weights, teacher, *rest):
        trees = (current["student"].optimizer, current["student"].params, teacher.model.params)
        kind = [{leaf.sharding.memory_kind for leaf in jax.tree.leaves(t)} for t in trees]
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(weights)} == {"device"}
        seen.append([one.pop() if len(one) == 1 else one for one in kind])
        return rollouts(config, number, episodes, weights, teacher, *rest)

    monkeypatch.setattr(module, "_step", watched_step)
    monkeypatch.setattr(module, "student_samples", watched)
    return seen


@pytest.mark.slow
def test_offload_changes_no_bit_and_survives_an_interruption(
    finished_run, plain, tmp_path, kinds, monkeypatch
):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    interrupt_consolidation(monkeypatch, work, tiny_config(**BF16, consolidate__offload=ALL), 2)
    go(work, tiny_config(**BF16, consolidate__offload=ALL), ["consolidate"])
    assert kinds == [["pinned_host"] * 3] * 3
    assert policy(work) == policy(plain)
    np.testing.assert_array_equal(losses(work), losses(plain))


@pytest.mark.slow
def test_without_offload_all_is_on_the_device(finished_run, plain, tmp_path, kinds):
    assert consolidated(finished_run, tmp_path / "run", **BF16) == policy(plain)
    assert kinds == [["device"] * 3] * 3


@pytest.mark.slow
def test_offload_of_an_adapters_moments(finished_run, tmp_path, kinds):
    lora = dict(lora__rank=2, consolidate__learning_rate=3e-3)
    here = consolidated(finished_run, tmp_path / "a", **lora)
    there = consolidated(finished_run, tmp_path / "b", **lora, consolidate__offload=("optimizer",))
    assert here == there and kinds[-1] == ["pinned_host", "device", "device"]


@pytest.mark.slow
def test_the_teacher_can_have_another_dtype(finished_run, plain, tmp_path, monkeypatch):
    """In float32 with a bfloat16 student, and the other way round."""
    teachers, made = [], module.Teacher

    def watched(*words, **settings):
        teachers.append(made(*words, **settings))
        return teachers[-1]

    monkeypatch.setattr(module, "Teacher", watched)
    for student, teacher in (("bfloat16", "float32"), ("float32", "bfloat16")):
        work = tmp_path / student
        changes = dict(model__dtype=student, consolidate__teacher_dtype=teacher)
        changes |= dict(consolidate__retention="knowledge", consolidate__teacher="trust_region")
        consolidated(finished_run, work, **changes, consolidate__steps=1)
        assert {x.dtype.name for x in jax.tree.leaves(teachers[-1].model.params)} == {teacher}
        assert np.isfinite(losses(work)).all()
    only = consolidated(
        finished_run, tmp_path / "only", **BF16, consolidate__teacher_dtype="float32"
    )
    assert only != policy(plain)
    # The same numbers but for bfloat16's rounding, in the first step.
    assert abs(losses(tmp_path / "only")[0] / losses(plain)[0] - 1) < 0.1


@pytest.mark.slow
def test_bfloat16_moments_train(finished_run, plain, tmp_path):
    work = tmp_path / "run"
    assert consolidated(finished_run, work, **BF16, consolidate__moments_dtype="bfloat16") != (
        policy(plain)
    )
    np.testing.assert_allclose(losses(work), losses(plain), rtol=0.05)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(lora__rank=2, consolidate__teacher="ema"), "consolidate.teacher is 'ema'"),
        (dict(lora__rank=2, consolidate__keep_fp32_master=True), "keep_fp32_master"),
        (dict(lora__rank=2, consolidate__teacher_dtype="float32"), "consolidate.teacher_dtype"),
        (dict(lora__rank=2, consolidate__offload=("teacher",), **BF16), "consolidate.offload"),
        (dict(lora__rank=2, consolidate__offload=("masters",), **BF16), "consolidate.offload"),
        (dict(lora__rank=2, guard__skill_drop=0.1, evaluate__skills=True), "guard.skill_drop"),
        (dict(consolidate__offload=("masters",)), "model.dtype='float32'"),
        (
            dict(consolidate__offload=("teacher",), consolidate__teacher="ema"),
            "consolidate.offload",
        ),
        (dict(consolidate__offload=("moments",)), "consolidate.offload is ('moments',)"),
        (dict(consolidate__offload=("none", "teacher")), "consolidate.offload"),
        (dict(lora__targets="q, v", lora__rank=2), "lora.targets is ('q', ' v')"),
        (dict(lora__targets="q,q", lora__rank=2), "lora.targets"),
        (dict(lora__targets="", lora__rank=2), "lora.targets"),
        (dict(lora__alpha=0.0), "lora.alpha"),
        (dict(lora__rank=-1), "lora.rank"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, words):
    with pytest.raises(UserError) as caught:
        validate(tiny_config(**changes))
    assert words in str(caught.value) and "config." in str(caught.value)


def test_a_rank_above_the_model_is_refused():
    mesh = make_mesh(1, 1, jax.devices()[:1])
    check_model(tiny_config(lora__rank=8), bundled.MODEL_DIR, mesh)
    with pytest.raises(UserError, match=r"config\.lora\.rank is 4096; it must be at most"):
        check_model(tiny_config(lora__rank=4096), bundled.MODEL_DIR, mesh)


def test_a_platform_without_host_memory_is_refused():
    """A stand-in for a device, since every platform here has the memory."""
    device = SimpleNamespace(
        device_kind="Toy", addressable_memories=lambda: [SimpleNamespace(kind="device")]
    )
    mesh = SimpleNamespace(devices=np.array([[device]], dtype=object))
    section = tiny_config(consolidate__offload=("optimizer",)).consolidate
    with pytest.raises(UserError, match=r"config\.consolidate\.offload.*Toy.*set it to \(\)"):
        check_offload(section, mesh)
    check_offload(tiny_config().consolidate, mesh)
    check_offload(section, make_mesh(1, 1, jax.devices()[:1]))
