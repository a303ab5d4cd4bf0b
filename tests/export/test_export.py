"""`python -m oel_jax.export`: the model of a round as its own directory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.export import command as export
from oel_jax.models.config import ModelConfig
from oel_jax.models.huggingface import load_params, save_model
from oel_jax.parallel.mesh import make_mesh
from oel_jax.runs.workdir import Workdir

ROOT = Path(__file__).resolve().parents[2]


def load(directory: Path):
    cfg = ModelConfig.from_directory(directory)
    mesh = make_mesh(1, 1, jax.devices()[:1])
    return cfg, load_params(directory, cfg, mesh=mesh, dtype=jnp.float32)


@pytest.fixture
def run(tiny_models, tmp_path) -> Path:
    """A workdir whose round 1 has a policy of several shards, and whose round 2 is not finished."""
    workdir = tmp_path / "run"
    source = tiny_models["qwen3_tied"]
    cfg, params = load(source)
    policy = Workdir(workdir).policy(1)
    save_model(policy, cfg, params, source=source, dtype="float32", shard_bytes=100_000)
    (policy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (policy / "notes.txt").write_text("not part of the model")
    Workdir(workdir).checkpoints(2).mkdir(parents=True)
    return workdir


def call(workdir: Path, number: int, out: Path, *more: str) -> int:
    return export.main([f"--workdir={workdir}", f"--round={number}", f"--out={out}", *more])


def test_the_command_copies_the_policy_bit_for_bit(run, tmp_path):
    out = tmp_path / "deep" / "model"
    done = subprocess.run(
        [sys.executable, "-m", "oel_jax.export", f"--workdir={run}", "--round=1", f"--out={out}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert str(out) in done.stdout
    policy = Workdir(run).policy(1)
    for file in policy.iterdir():
        if file.name != "notes.txt":
            assert (out / file.name).read_bytes() == file.read_bytes()
    assert {f.name for f in policy.iterdir()} - {f.name for f in out.iterdir()} == {"notes.txt"}


def test_a_cast_copy(run, tmp_path):
    out = tmp_path / "model"
    assert call(run, 1, out, "--dtype=bfloat16") == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    _, params = load(Workdir(run).policy(1))
    _, cast = load(out)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(cast), strict=True):
        np.testing.assert_array_equal(before.astype(jnp.bfloat16).astype(jnp.float32), after)
    assert (out / "chat_template.jinja").exists()


def test_transformers_reads_both_copies(run, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    logits = []
    for name, more in (("a", []), ("b", ["--dtype=float32"])):
        assert call(run, 1, tmp_path / name, *more) == 0
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            logits.append(model(torch.arange(20)[None]).logits.numpy())
    np.testing.assert_array_equal(*logits)


def test_refusals(run, tmp_path, capsys):
    def said(status: int) -> str:
        assert status == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "does not exist" in said(call(tmp_path / "typo", 1, out))
    assert "round 2 has no policy; choose a finished round (1)" in said(call(run, 2, out))
    assert "rounds count from 1" in said(call(run, 0, out))
    (tmp_path / "empty").mkdir()
    assert "no round of this run is finished" in said(call(tmp_path / "empty", 1, out))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("")
    assert "taken exists and is not empty" in said(call(run, 1, taken))
    assert [file.name for file in taken.iterdir()] == ["mine"]
    shard = next(Workdir(run).policy(1).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard.name} is truncated" in said(call(run, 1, out))
    shutil.rmtree(Workdir(run).policy(1))
    assert not out.exists()
