"""Names, atomic writes, the manifest, the lock, and every refusal of the run directory."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.config.defaults import as_json, default
from oel_jax.runs import workdir as workdir_module
from oel_jax.runs.workdir import Workdir, lock_directory

CONFIG = {"seed": 0, "rounds": 2, "loss": {"top_k": 256, "chunk": 512}, "log": {"every": 5.0}}


def changed(**fields):
    return {**CONFIG, **fields}


def test_names_of_the_layout(tmp_path):
    w = Workdir(tmp_path)
    names = [
        (w.trajectories(1), "round_001/trajectories"),
        (w.knowledge_step(2, 9, 3), "round_002/knowledge/chain_09/step_003.json"),
        (w.knowledge(1), "round_001/knowledge/knowledge.json"),
        (w.checkpoints(1), "round_001/consolidate"),
        (w.policy(12), "round_012/policy"),
        (w.evaluation(1, "in_context"), "round_001/evaluate/in_context.json"),
        (w.start_evaluation, "evaluate/start.json"),
        (w.config_file, "config.json"),
        (w.manifest_file, "manifest.json"),
        (w.metrics_file, "metrics.jsonl"),
        (w.summary_file, "summary.json"),
        (w.tensorboard, "tensorboard"),
    ]
    assert [path.relative_to(tmp_path).as_posix() for path, _ in names] == [n for _, n in names]
    for bad in ("../x", "A", "", "a/b"):
        with pytest.raises(UserError, match="no name for an artifact"):
            w.evaluation(1, bad)
    with pytest.raises(UserError, match="rounds count from 1"):
        w.policy(0)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def _write_for_ever(path):
    while True:
        for size in (1, 200_000):
            write_json(path, ["x" * size])


def test_atomic_write_survives_a_kill(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, ["x"])
    # spawn: JAX's threads must not be forked
    writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(path,))
    writer.start()
    seen = set()
    while seen != {1, 200_000}:
        seen.add(len(read_json(path)[0]))
    writer.kill()
    writer.join()
    assert len(read_json(path)[0]) in seen


def test_unreadable_json_is_named(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"x\.json is missing"):
        read_json(path)
    path.write_bytes(b'{"a": \xff')
    with pytest.raises(UserError, match=r"x\.json is not valid JSON"):
        read_json(path)


def test_a_run_of_the_old_layout_is_read_and_not_resumed(tmp_path):
    with Workdir(tmp_path / "run").open(CONFIG) as w:
        old = w.round(1) / "deploy" / "step_001.jsonl"
        old.parent.mkdir(parents=True)
        old.write_text("game\n")
        w.finish(1, "deploy", [old], 1.5)
    with pytest.raises(UserError, match=r"older version .*round_001/deploy.* new --workdir"):
        Workdir(tmp_path / "run").open(CONFIG)
    assert Workdir(tmp_path / "run").finished(1, "deploy")  # what only reads continues
    assert lock_directory(tmp_path / "run")  # and the lock was given back


def test_a_stage_is_finished_only_with_all_its_files(tmp_path):
    with Workdir(tmp_path / "run").open(CONFIG) as w:
        games, policy = w.trajectories(1) / "deploy_0000.jsonl", w.policy(1)
        games.parent.mkdir(parents=True)
        games.write_text("game\n")
        (policy / "sub").mkdir(parents=True)
        (policy / "sub" / "model.safetensors").write_bytes(b"12345")
        assert not w.finished(1, "deploy")
        w.finish(1, "deploy", [games], 1.5)
        w.finish(1, "consolidate", [policy], 2.0)
        assert w.finished(1, "deploy") and w.finished(1, "consolidate")
        assert not w.finished(2, "deploy")
        assert w.seconds(1) == {"deploy": 1.5, "consolidate": 2.0}

    with Workdir(tmp_path / "run").open(CONFIG) as w:
        assert w.finished(1, "deploy") and w.finished(1, "consolidate")
        w.verify(1, "consolidate")
        (policy / "sub" / "model.safetensors").write_bytes(b"12346")  # same size
        assert w.finished(1, "consolidate")
        with pytest.raises(UserError, match=r"model\.safetensors is missing or has changed"):
            w.verify(1, "consolidate")
        (policy / "sub" / "model.safetensors").write_bytes(b"1234")
        assert not w.finished(1, "consolidate")
        games.unlink()
        assert not w.finished(1, "deploy")
        with pytest.raises(UserError, match="stage extract of round 1 is not finished"):
            w.verify(1, "extract")
        games.write_text("other game\n")
        w.finish(1, "deploy", [games], 9.0)
        assert w.finished(1, "deploy") and w.seconds(1)["deploy"] == 9.0
        assert len(read_json(w.manifest_file)["stages"]) == 2


def test_files_outside_are_neither_recorded_nor_followed(tmp_path):
    outside = tmp_path / "secret"
    outside.write_text("s")
    with Workdir(tmp_path / "run").open(CONFIG) as w:
        with pytest.raises(ValueError, match="not in the subpath"):
            w.finish(1, "deploy", [outside], 0.0)
        w.finish(1, "deploy", [w.config_file], 0.0)
    manifest = read_json(w.manifest_file)
    for path in ("../secret", str(outside)):
        manifest["stages"][0]["files"][0]["path"] = path
        write_json(w.manifest_file, manifest)
        with Workdir(tmp_path / "run").open(CONFIG) as again:
            with pytest.raises(UserError, match="leads out of the workdir"):
                again.finished(1, "deploy")


def test_a_changed_config_is_refused_with_its_fields(tmp_path):
    Workdir(tmp_path).open(CONFIG).close()
    new = changed(seed=1, loss={"top_k": 64, "chunk": 512}, extra="x")
    with pytest.raises(UserError) as caught:
        Workdir(tmp_path).open(new)
    message = str(caught.value)
    assert "config.seed: 0 -> 1" in message and "config.loss.top_k: 256 -> 64" in message
    assert 'config.extra: None -> "x"' in message
    assert "chunk" not in message and "--allow_config_change" in message
    assert read_json(tmp_path / "config.json") == CONFIG

    Workdir(tmp_path).open(new, allow_change=True).close()
    assert read_json(tmp_path / "config.json") == new
    recorded = read_json(tmp_path / "manifest.json")["config_changes"]
    assert recorded[0]["fields"]["loss.top_k"] == {"old": 256, "new": 64}
    Workdir(tmp_path).open(new).close()
    assert len(read_json(tmp_path / "manifest.json")["config_changes"]) == 1


def test_free_fields_may_change_and_are_recorded(tmp_path):
    Workdir(tmp_path).open(CONFIG).close()
    new = changed(rounds=5, loss={"top_k": 256, "chunk": 64}, log={"every": 1.0})
    Workdir(tmp_path).open(new).close()
    assert read_json(tmp_path / "config.json") == new
    fields = read_json(tmp_path / "manifest.json")["config_changes"][0]["fields"]
    assert set(fields) == {"rounds", "loss.chunk", "log.every"}


def test_a_real_config_survives_the_round_trip(tmp_path):
    config = default()
    config.evaluate.curve = (1, 5)
    for _ in range(2):
        Workdir(tmp_path).open(as_json(config)).close()
    assert read_json(tmp_path / "config.json") == as_json(config)


def test_paths_that_cannot_be_a_workdir(tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(UserError, match=r"--workdir=.*file cannot be written: it is a file"):
        Workdir(file).open(CONFIG)
    with pytest.raises(UserError, match=r"cannot be written: Not a directory"):
        Workdir(file / "run").open(CONFIG)
    assert file.read_text() == "precious"
    Workdir(tmp_path / "a" / "b" / "c").open(CONFIG).close()
    assert (tmp_path / "a/b/c/config.json").is_file()


def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o755)
    shut = tmp_path / "shut"
    shut.mkdir()
    shut.chmod(0o555)
    user = os.geteuid()
    if user == 0:  # root passes every permission bit: become somebody else meanwhile
        for parent in tmp_path.parents:
            if parent.stat().st_uid == 0 and parent.name.startswith("pytest"):
                parent.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="shut cannot be written: Permission denied"):
            Workdir(shut).open(CONFIG)
    finally:
        os.seteuid(user)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's read-only /proc")
def test_a_file_system_without_room_for_files_is_refused():
    with pytest.raises(UserError, match="cannot be written"):
        Workdir("/proc/oel_run").open(CONFIG)


def test_a_second_process_is_refused_by_pid(tmp_path):
    code = (
        "import sys; from oel_jax.runs.workdir import Workdir\n"
        "w = Workdir(sys.argv[1]).open({'seed': 0}); print('open', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(workdir_module.__file__).parents[2],
    )
    assert holder.stdout.readline() == b"open\n"
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
        Workdir(tmp_path).open({"seed": 0})
    holder.kill()  # a killed process leaves no lock
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    Workdir(tmp_path).open({"seed": 0}).close()


def test_a_refused_open_gives_the_lock_back(tmp_path):
    Workdir(tmp_path).open(CONFIG).close()
    with pytest.raises(UserError):
        Workdir(tmp_path).open(changed(seed=7))
    Workdir(tmp_path).open(CONFIG).close()


def test_foreign_and_damaged_manifests_are_refused(tmp_path):
    Workdir(tmp_path).open(CONFIG).close()
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"schema": "oel.workdir/9", "stages": []}))
    with pytest.raises(UserError, match="oel.workdir/9"):
        Workdir(tmp_path).open(CONFIG)
    manifest.write_text("[1")
    with pytest.raises(UserError, match=r"manifest\.json is not valid JSON"):
        Workdir(tmp_path).open(CONFIG)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json does not"):
        Workdir(tmp_path).open(CONFIG)


def test_workdir_and_metrics_import_no_jax():
    code = (
        "import sys, oel_jax.runs.workdir, oel_jax.runs.metrics\n"
        "import oel_jax.config.defaults, oel_jax.report.intervals\n"
    )
    code += "print([m for m in ('jax', 'tensorflow', 'textarena') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(workdir_module.__file__).parents[2],
    )
    assert found.stdout.strip() == "[]"
