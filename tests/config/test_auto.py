"""Fields that are 'auto': decided by the planner's arithmetic, once, and overridable."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import as_flags, tiny_config

import oel_jax
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.config.checks import validate
from oel_jax.config.defaults import as_json, auto_fields, default, with_fields
from oel_jax.config.file import load_config
from oel_jax.models import bundled
from oel_jax.plan import auto
from oel_jax.plan.search import on_target
from oel_jax.plan.shapes import model_shape
from oel_jax.plan.targets import GPUS, TPUS, Target
from oel_jax.plan.workload import Assumptions

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
H200 = Target("h200:8", GPUS["h200"], 8, 8)
V5P = Target("v5p:4x4x4", TPUS["v5p"], 64, 4)
QWEN = sorted(CONFIGS.glob("*qwen3*.py"))


def hours_of(config, shape, target):
    plan = on_target(config, shape, target, Assumptions.of(config))
    return sum(plan.hours.values()), plan.fits


@pytest.mark.parametrize("file", QWEN, ids=lambda file: file.stem)
@pytest.mark.parametrize("target", [H200, V5P], ids=lambda target: target.text)
def test_qwen3_configs_get_a_mesh_that_fits_and_is_no_slower_than_all_on_fsdp(file, target):
    config = load_config(file, None)
    assert auto_fields(config) == ["mesh.fsdp", "mesh.tp", "sampler.slots"]
    validate(config)
    shape = model_shape(config.model.path)
    decided, line = auto.settle_for(config, shape, target)
    assert not auto_fields(decided) and auto_fields(config)  # a copy
    assert decided.mesh.fsdp * decided.mesh.tp == target.count
    assert all(f"{name}={value}" in line for name, value in auto._values(decided).items())
    validate(decided)
    now, fits = hours_of(decided, shape, target)
    assert fits
    plain = {"mesh.fsdp": -1, "mesh.tp": 1, "sampler.slots": 64, "sampler.prefill_rows": 8}
    before, _ = hours_of(with_fields(config, plain), shape, target)
    assert now <= before * 1.001


def test_8b_on_eight_h200_is_ten_times_quicker_than_all_on_fsdp():
    config = load_config(CONFIGS / "frozen_lake_qwen3_8b.py", None)
    shape = model_shape(config.model.path)
    began = time.process_time()
    decided, line = auto.settle_for(config, shape, H200)
    assert time.process_time() - began < 10  # under 1 s where nothing else runs
    now, _ = hours_of(decided, shape, H200)
    before, _ = hours_of(
        with_fields(config, {"mesh.fsdp": 8, "mesh.tp": 1, "sampler.slots": 64}), shape, H200
    )
    assert before > 10 * now and f"about {now:.3g} hours" in line


@pytest.mark.parametrize(
    "fixed",
    [
        {"mesh.fsdp": 4, "mesh.tp": 2},
        {"mesh.tp": 4},
        {"mesh.fsdp": -1},
        {"sampler.slots": 16},
        {"mesh.fsdp": 2, "sampler.slots": 24},
    ],
)
def test_what_is_given_is_kept(fixed):
    config = with_fields(load_config(CONFIGS / "frozen_lake_qwen3_8b.py", None), fixed)
    decided, line = auto.settle_for(config, model_shape(config.model.path), H200)
    for path, value in fixed.items():
        group, _, name = path.partition(".")
        assert decided[group][name] == (4 if value == -1 and decided.mesh.tp == 2 else value) or (
            value == -1 and decided.mesh.fsdp * decided.mesh.tp == 8
        )
        assert f"--config.{path}=" not in line
    assert not auto_fields(decided)


def test_what_cannot_be_is_named():
    config = with_fields(load_config(CONFIGS / "frozen_lake_qwen3_8b.py", None), {"mesh.tp": 3})
    with pytest.raises(UserError, match=r"mesh\.fsdp='auto'.*"):
        auto.settle_for(config, model_shape(config.model.path), H200)


def test_nothing_is_decided_where_nothing_is_auto():
    config = tiny_config()
    assert auto.settle(config) == (config, "")


@pytest.mark.parametrize(
    ("changes", "count", "each", "expected"),
    [
        ({}, 1, 1, (-1, 1, 64, 8)),
        ({}, 8, 8, (-1, 1, 64, 8)),
        ({}, 12, 12, (-1, 1, 72, 12)),
        ({}, 24, 12, (-1, 1, 72, 12)),
        ({"mesh.tp": 4}, 8, 8, (-1, 4, 64, 8)),
        ({"mesh.fsdp": 2}, 8, 8, (2, 4, 64, 8)),
        ({"sampler.slots": 8}, 8, 8, (-1, 1, 8, 8)),
    ],
)
def test_unknown_devices_get_a_plain_rule(changes, count, each, expected):
    names = dict.fromkeys(("mesh.fsdp", "mesh.tp", "sampler.slots"), "auto")
    config = with_fields(default(), names | changes)
    decided, line = auto._by_rule(config, count, each, "some device")
    assert tuple(auto._values(decided).values()) == expected
    assert "some device is not known to the planner" in line


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", None),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", None),
        ("cpu", None),
    ],
)
def test_device_names(kind, name):
    device = SimpleNamespace(device_kind=kind, memory_stats=lambda: {"bytes_limit": 7})
    known = {**GPUS, **TPUS}.get(name)
    assert auto._known(device) == (known and replace(known, memory=7))


@pytest.mark.parametrize("value", ["auto", "4", "-1"])
def test_the_flag_takes_text_and_numbers(value):
    config = default()
    config.mesh.fsdp = value if value == "auto" else int(value)
    validate(config)
    for wrong in ("all", 0, 2.0, None, True):
        config = with_fields(default(), {"mesh.fsdp": wrong})
        with pytest.raises(UserError, match=r"config.mesh.fsdp is .* or 'auto'"):
            validate(config)


def test_a_run_records_what_was_decided(tmp_path, capsys):
    flags = as_flags(mesh__fsdp="auto", mesh__tp="auto", sampler__slots="auto")
    given = tiny_config(mesh__fsdp="auto", mesh__tp="auto", sampler__slots="auto")
    assert f"--config.mesh.fsdp={as_json(given)['mesh']['fsdp']}" in flags
    oel_jax.run(given, tmp_path, ["deploy"])
    said = capsys.readouterr().out
    assert "auto: --config.mesh.fsdp=-1 --config.mesh.tp=1 --config.sampler.slots=64" in said
    kept = read_json(tmp_path / "config.json")
    assert (kept["mesh"], kept["sampler"]["slots"]) == ({"fsdp": -1, "tp": 1}, 64)
    oel_jax.run(given, tmp_path, ["deploy"])  # it resumes
    assert bundled.MODEL_DIR.is_dir()
