"""The benchmarks run, at toy sizes: what they print and write is checked, not their speed."""

import json

import pytest
import tiny_run
from tiny_run import FIELDS

from benchmarks import (
    attention,
    consolidate,
    logs,
    loop,
    plan_table,
    sampler,
    serve_engine,
    side_by_side,
    tables,
    topk_kl,
)
from benchmarks.models import SHAPES
from benchmarks.side_by_side import Bar
from oel_jax.base.errors import UserError
from oel_jax.models import bundled
from oel_jax.plan.shapes import KNOWN
from oel_jax.plan.targets import Device, Target


def run(monkeypatch, main, *words):
    monkeypatch.setattr("sys.argv", ["benchmark", *words])
    return main()


@pytest.mark.slow
def test_sampler_against_transformers(monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="the peer is transformers' PyTorch model")
    words = ["--knowledge=70", "--games=4", "--turns=2", "--answer=3", "--repeats=1"]
    monkeypatch.setitem(SHAPES, "25m", (64, 2, 4, 2, 16, 96, 512, True))
    assert run(monkeypatch, sampler.main, *words, f"--out={tmp_path}") == 0
    record = json.loads(next(tmp_path.glob("sampler_25m_70_4_2_3_*.json")).read_text())
    assert record["tokens"] == 4 * 2 * 3
    assert set(record["seconds"]) == {"ours", "transformers"}
    assert record["bars"][0]["target"] == 8.0
    assert record["versions"]["jax"] and record["device"] and record["date"]
    out = capsys.readouterr().out
    # Knowledge once; four openings; what the histories grow by; no last tokens.
    assert f"encoded by ours: {70 + 4 * 159 + 4 * 99}" in out
    assert "transformers / ours" in out and "bar >= 8" in out


@pytest.mark.slow
def test_the_engine_against_batched_generate(monkeypatch, tmp_path, capsys):
    """Both sides answer the same prompts alike, so they generate equally many tokens."""
    pytest.importorskip("torch", reason="the peer is transformers' PyTorch model")
    words = ["--clients=3", "--prompt=90", "--answer=6", "--system=20", "--repeats=1"]
    words += [f"--model={bundled.MODEL_DIR}", "--peers=batched", f"--out={tmp_path}"]
    assert run(monkeypatch, serve_engine.main, *words) == 0
    record = json.loads(next(tmp_path.glob("serve_engine_*.json")).read_text())
    notes = record["notes"]
    assert notes["ours"]["tokens"] == notes["batched generate"]["tokens"]
    assert notes["ours"]["tokens"][0] > 6  # of 3 clients with 2 turns
    assert "ours / batched generate" in capsys.readouterr().out


@pytest.mark.slow
def test_sampler_takes_a_directory_and_can_run_alone(monkeypatch, tmp_path):
    words = ["--knowledge=0", "--games=2", "--turns=2", "--answer=2", "--repeats=1", "--peer=none"]
    model = f"--model={bundled.MODEL_DIR}"
    assert run(monkeypatch, sampler.main, *words, model, f"--out={tmp_path}", "--check") == 0
    assert list(tmp_path.glob("sampler_small_0_2_2_2_*.json"))


def test_loss_against_its_products(monkeypatch, tmp_path):
    words = ["--tokens=64", "--width=16", "--vocabulary=640", "--top-k=8", "--repeats=2"]
    run(monkeypatch, topk_kl.main, *words, f"--out={tmp_path}")
    record = json.loads(next(tmp_path.glob("topk_kl_*.json")).read_text())
    assert record["flops"] == 4 * 2 * 64 * 16 * 640
    assert len(record["seconds"]["products alone"]) == 2
    assert [bar["most"] for bar in record["bars"]] == [True, True]


@pytest.mark.slow
def test_consolidation_against_torch(monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="the peer is written in torch")
    monkeypatch.setitem(SHAPES, "25m", (64, 2, 4, 2, 16, 96, 512, True))
    words = ["--knowledge=96", "--texts=2", "--prefixes=6", "--prompt=20", "--answer=8"]
    words += ["--repeats=2", "--token-budget=512", f"--out={tmp_path}"]
    assert run(monkeypatch, consolidate.main, *words) == 0
    record = json.loads(next(tmp_path.glob("consolidate_25m_96_2_6_*.json")).read_text())
    assert record["losses"][0] == pytest.approx(record["losses"][1], rel=1e-4)
    # No bar at such a size.
    assert [(bar["target"], bar["met"]) for bar in record["bars"]] == [(None, True)] * 2
    assert len(record["seconds"]["torch step"]) == 2
    assert "torch / ours" in capsys.readouterr().out


@pytest.mark.slow
def test_consolidation_compares_nothing_if_the_losses_differ(monkeypatch, tmp_path):
    pytest.importorskip("torch", reason="the peer is written in torch")
    monkeypatch.setitem(SHAPES, "25m", (64, 2, 4, 2, 16, 96, 512, True))
    right = consolidate.Torch._log_probs
    monkeypatch.setattr(
        consolidate.Torch, "_log_probs", lambda self, model, h: right(self, model, 2 * h)
    )
    words = ["--knowledge=96", "--texts=2", "--prefixes=4", "--prompt=20", "--answer=8"]
    with pytest.raises(UserError, match="do not compute the same loss"):
        run(monkeypatch, consolidate.main, *words, "--repeats=1", f"--out={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_attention(monkeypatch, tmp_path):
    words = ["--tokens=1536", "--segments=12", "--heads=2", "--repeats=1", f"--out={tmp_path}"]
    assert run(monkeypatch, attention.main, *words) == 0
    record = json.loads(next(tmp_path.glob("attention_1536_12_2_*.json")).read_text())
    assert record["tiles"]["packed"] < record["tiles"]["one segment"] == 12
    assert record["bars"][0]["target"] is None and record["ratio"][0] > 0


@pytest.mark.slow
def test_loop(monkeypatch, tmp_path):
    fields = {name: value for name, value in FIELDS.items() if name != "compilation_cache"}
    monkeypatch.setattr(loop, "PRESETS", {"nano": "nano_frozen_lake"})
    words = [f"{name}={value}" for name, value in fields.items() if "tensorboard" not in name]
    run(monkeypatch, loop.main, "--repeats=1", f"--out={tmp_path}", "--set", *words)
    (file,) = tmp_path.glob("loop_nano_*.json")
    record = json.loads(file.read_text())
    assert record["runs"]["cold"]["compiling"] > record["runs"]["warm"]["compiling"] > 0
    stages = {"deploy", "extract", "consolidate", "evaluate"}
    assert stages <= set(record["runs"]["warm"])
    assert record["runs"]["warm"]["all"] > sum(record["runs"]["warm"][stage] for stage in stages)
    assert set(record["extraction_seconds"]) == {"lock-step", "one after another"}


def test_import_of_logs(monkeypatch, tmp_path, capsys):
    words = ["--conversations=40,120", "--repeats=1", f"--out={tmp_path}"]
    assert run(monkeypatch, logs.main, *words) == 0
    record = json.loads(next(tmp_path.glob("logs_40_120_*.json")).read_text())
    small, large = record["sizes"]["40"], record["sizes"]["120"]
    assert large["answers"] > small["answers"] > 40 and set(small["redacted"]) >= {"email", "card"}
    assert [bar["target"] for bar in record["bars"]] == [None, None]  # no bar at such a size
    assert "peak memory" in capsys.readouterr().out


def test_a_missed_bar_is_said_and_checked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark", "--check", f"--out={tmp_path}"])
    options = side_by_side.parser("").parse_args()
    bars = [Bar("speed", 1.9, 2.0), Bar("time", 1.9, 2.0, most=True)]
    status = side_by_side.finish("toy", {}, [["a", 1]], ["side", "n"], bars, {}, options)
    out = capsys.readouterr().out
    assert status == 1
    assert "speed: 1.90 (bar >= 2): MISSED" in out and "time: 1.90 (bar <= 2): met" in out


@pytest.fixture
def toy_plans(monkeypatch):
    """The table's cells with a toy model, few programs and small shapes."""
    config = tiny_run.tiny_config(mesh__fsdp=-1, sampler__max_len=0)
    monkeypatch.setattr(
        plan_table, "load_config", lambda file: config.copy_and_resolve_references()
    )
    monkeypatch.setitem(KNOWN, "toy/toy", (64, 2, 8, 4, 16, 96, 512, True))
    monkeypatch.setattr(plan_table, "COMPILED", ("update",))


def test_a_table_of_plans(monkeypatch, tmp_path, capsys, toy_plans):
    words = ["--models=toy/toy", "--targets=cpu:8", f"--out={tmp_path}"]
    assert run(monkeypatch, plan_table.main, *words) == 0
    file = tmp_path / "plan_toy_cpu_8.json"
    record = json.loads(file.read_text())
    assert record["fits"] and record["step_seconds"] > 0 and record["date"]
    assert list(n for n, one in record["programs"].items() if "compiled" in one) == ["update"]
    # Parameters, two moments and gradients in float32 over the 8 devices.
    held = record["programs"]["update"]["compiled"]["arguments"]
    whole = 4 * 4 * record["parameters"] / 8
    assert whole <= held <= whole * 1.2
    assert "| toy, cpu:8 | " in tables.table(tmp_path) and " | yes | " in tables.table(tmp_path)
    made = file.stat().st_mtime_ns
    run(monkeypatch, plan_table.main, *words)  # what is there is not made again
    assert file.stat().st_mtime_ns == made
    run(monkeypatch, plan_table.main, *words, "--again")
    assert file.stat().st_mtime_ns > made


def test_a_table_with_a_model_that_fits_nowhere(monkeypatch, tmp_path, toy_plans):
    small = Device("toy", 1000, 1e12, 1e12, 1e12)
    monkeypatch.setattr(plan_table, "find", lambda text: Target(text, small, 8, 8))
    words = ["--models=toy/toy", "--targets=toy:8", f"--out={tmp_path}"]
    assert run(monkeypatch, plan_table.main, *words) == 0
    assert " | no | " in tables.table(tmp_path) and "not compiled" in tables.table(tmp_path)
    with pytest.raises(UserError, match="--models: a/b is none of"):
        run(monkeypatch, plan_table.main, "--models=a/b")


def test_ratios_go_repeat_by_repeat():
    assert side_by_side.ratio([2.0, 6.0, 9.0], [1.0, 2.0, 4.0]) == (2.25, 2.0, 3.0)


def test_the_table_in_the_docs_is_what_the_records_say(tmp_path):
    assert tables.replaced(tables.PAGE.read_text(), tables.table()) == tables.PAGE.read_text()
    record = json.loads(next(side_by_side.RESULTS.glob("loop_*.json")).read_text())
    record["bars"] = [{"name": "a ratio", "value": 1.5, "target": 2, "most": False, "met": False}]
    (tmp_path / "one.json").write_text(json.dumps(record))
    assert "| a ratio | 1.50 (missed) | >= 2 |" in tables.table(tmp_path)
    with pytest.raises(ValueError, match="lacks the lines"):
        tables.replaced("no marks", "")
