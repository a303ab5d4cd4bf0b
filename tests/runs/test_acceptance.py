"""Which policy of a workdir is served."""

import json
import subprocess
import sys

import pytest

from oel_jax.base.errors import UserError
from oel_jax.runs import acceptance
from oel_jax.runs.workdir import Workdir


@pytest.fixture
def workdir(tmp_path):
    with Workdir(tmp_path / "run").open({"model": {"path": "nano"}, "rounds": 4}) as opened:
        yield opened


def consolidated(workdir, number, text="weights"):
    policy = workdir.policy(number)
    policy.mkdir(parents=True, exist_ok=True)
    (policy / "config.json").write_text("{}")
    (policy / "model.safetensors").write_text(text)
    workdir.finish(number, "consolidate", [policy], 1.0)


def names(workdir):
    return [policy.name for policy in acceptance.accepted_policies(workdir)]


def test_it_imports_no_jax():
    code = "import sys; sys.modules['jax'] = None; import oel_jax.runs.acceptance"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_start_serves_until_a_round_is_consolidated(workdir):
    assert acceptance.newest_policy(workdir) == ("round_000", "nano")
    workdir.policy(1).mkdir(parents=True)
    (workdir.policy(1) / "config.json").write_text("{}")  # written, not recorded
    assert acceptance.newest_policy(workdir).name == "round_000"
    consolidated(workdir, 1)
    other = Workdir(workdir.root)  # a server's; what it reads is not kept from the call before
    assert acceptance.newest_policy(other) == ("round_001", str(workdir.policy(1)))
    consolidated(workdir, 2)
    assert names(other) == ["round_002", "round_001", "round_000"]
    workdir.finish(3, "deploy", [], 1.0)
    assert acceptance.newest_policy(other).name == "round_002"


def test_files_that_are_missing_or_cut_short_are_not_taken(workdir):
    consolidated(workdir, 1)
    consolidated(workdir, 2, "long weights")
    weights = workdir.policy(2) / "model.safetensors"
    weights.write_text("long")
    assert acceptance.newest_policy(workdir).name == "round_001"
    assert acceptance.incomplete_policies(workdir) == ["round_002"]
    weights.write_text("long_weights")  # the size is right, the content is not
    assert acceptance.newest_policy(workdir).name == "round_002"
    with pytest.raises(UserError, match="model.safetensors is missing or has changed"):
        acceptance.check_policy(workdir, "round_002")
    acceptance.check_policy(workdir, "round_001")
    acceptance.check_policy(workdir, "round_000")


def test_a_refused_policy_is_passed_over_until_it_is_allowed(workdir):
    consolidated(workdir, 1)
    consolidated(workdir, 2)
    acceptance.refuse_policy(workdir, "round_002", "too long")
    assert names(workdir) == ["round_001", "round_000"]
    assert acceptance.refused(workdir)["round_002"]["reason"] == "too long"
    acceptance.refuse_policy(workdir, "round_001", "worse")
    assert names(workdir) == ["round_000"]
    acceptance.allow(workdir, "round_002")
    assert names(workdir) == ["round_002", "round_000"]
    for name in ("round_000", "round_002"):
        acceptance.refuse_policy(workdir, name, "all")
    with pytest.raises(UserError, match="refuses every policy"):
        acceptance.newest_policy(workdir)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": "oel.serving/9", "refused": {}}', '{"schema": "oel.serving/1"}']
)
def test_a_damaged_file_is_named(workdir, text):
    acceptance.serving_file(workdir).write_text(text)
    with pytest.raises(UserError, match="serving.json"):
        acceptance.newest_policy(workdir)


def test_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        acceptance.newest_policy(Workdir(tmp_path))


def test_the_file_is_json_with_a_schema(workdir):
    acceptance.refuse_policy(workdir, "round_001", 'a "reason"\n')
    stored = json.loads(acceptance.serving_file(workdir).read_text())
    assert stored["schema"] == "oel.serving/1"
    assert stored["refused"]["round_001"]["reason"] == 'a "reason"\n'
