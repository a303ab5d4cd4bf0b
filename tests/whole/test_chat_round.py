"""A whole chat round by the command: what it writes and shows, without a game, and after kills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kill_anywhere import Interrupted, differences
from tiny_run import FIELDS, ROOT

from oel_jax.base.files import read_json
from oel_jax.data.conversations import ConversationStore
from oel_jax.data.messages import user
from oel_jax.data.trajectories import Trajectory, Transcript
from oel_jax.runs.metrics import read_metrics
from oel_jax.testing import write_dummy_model

CONFIG = ROOT / "configs" / "chat.py"
_OF_CHAT = ("preflight.games", "evaluate.maps", "evaluate.seeds", "extract.max_prompt")


def fields(model: Path, **changes) -> dict[str, object]:
    """A tiny chat round; 'user', since the small models' template has no system role."""
    kept = {name: value for name, value in FIELDS.items() if name not in _OF_CHAT}
    kept |= {
        "model.path": str(model),
        "model.thinking": False,
        "logs.heldout": 0.3,
        "extract.place": "user",
        "extract.max_prompt": 1900,
        "sampler.max_len": "none",
        "log.tensorboard": True,
        "evaluate.conversations": 3,
    }
    return kept | changes


def fill(workdir: Path) -> None:
    """What a server would have recorded."""
    with ConversationStore(workdir / "conversations") as store:
        for n in range(14):
            transcript = Transcript()
            transcript.add([user(f"Go to field {n} <b>now</b>")], "I go up", approved=n % 3 == 0)
            one = Trajectory("round_000", "deploy", transcript.turns, id=f"c{n}", user=f"u{n % 7}")
            store.append_exchange(one)
            if n % 2:
                store.append_feedback(f"c{n}", "Go down!", time="2026-01-31T12:00:00Z")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_dummy_model(tmp_path_factory.mktemp("dummy") / "model", seed=1)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """(workdir, what was printed) of a run in a process of its own."""
    scratch = tmp_path_factory.mktemp("chat")
    scorer = scratch / "scorer.py"
    scorer.write_text("def words(messages, answer):\n    return len(messages) + 0.5\n")
    settings = fields(model) | {"evaluate.scorer": f"{scorer}:words"}
    fill(scratch / "run")
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    code = (
        "import atexit, sys\n"
        "games = lambda: [m for m in sys.modules if m.startswith(('oel_jax.environments',"
        " 'textarena'))]\n"
        "atexit.register(lambda: print('games imported:', games()))\n"
        "from oel_jax.__main__ import main\n"
        "main(sys.argv[1:])\n"
    )
    words = [sys.executable, "-c", code, "run", f"--config={CONFIG}", *flags]
    done = subprocess.run(
        [*words, f"--workdir={scratch / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return scratch / "run", done.stdout


@pytest.mark.e2e
def test_a_chat_round_imports_no_game(finished):
    assert "games imported: []" in finished[1]


@pytest.mark.e2e
def test_a_chat_round_is_measured_on_what_was_held_out(finished):
    work, printed = finished
    results = {
        name: read_json(work / "round_001" / "evaluate" / f"conversations_{name}.json")
        for name in ("before", "in_context", "consolidated")
    }
    for name, one in results.items():
        assert one["answers"] == one["conversations"] == 3 == len(one["response_tokens_of"])
        assert one["score"] == 1.5
        assert (one["kl"] is None) is (one["general"] is None) is (name == "in_context")
    before, after = results["before"], results["consolidated"]
    assert before["kl"]["kl"] >= 0 and before["kl"]["tokens"] > 0
    assert before["general"]["log_prob"] != after["general"]["log_prob"]
    heldout = read_json(work / "round_001" / "trajectories" / "snapshot.json")["heldout"]
    assert heldout == 3
    assert "before, knowledge in context" in printed and "KL to the teacher" in printed
    rows = {row["stage"]: row["values"] for row in read_metrics(work / "metrics.jsonl")}
    assert rows["deploy"]["heldout"] == 3
    assert rows["evaluate_conversations_consolidated"]["kl"] == after["kl"]["kl"]
    summary = read_json(work / "summary.json")["rounds"][0]
    assert summary["after consolidation"]["response_tokens"] == after["response_tokens"]


@pytest.mark.e2e
def test_the_page_shows_answers_side_by_side_as_text(finished):
    page = (finished[0] / "report.html").read_text()
    samples = read_json(
        finished[0] / "round_001" / "evaluate" / "conversations_consolidated.samples.json"
    )["answers"]
    assert "Round 1: answers side by side" in page and "&lt;b&gt;now" in page
    assert "<b>now" not in page
    assert len(samples) == 3 and all(one["messages"] for one in samples)
    assert "tokens per held-out answer" in page and "conversations, model" in page
    assert "pass rate" not in page


@pytest.mark.e2e
def test_the_conversations_are_the_round_s_trajectories(finished):
    lines = []
    for file in sorted((finished[0] / "round_001" / "trajectories").glob("*.jsonl")):
        lines += [(file.name, json.loads(line)) for line in file.read_text().splitlines()]
    by_file = {name: [one["id"] for n, one in lines if n == name] for name, _ in lines}
    assert set(by_file) == {
        "extract_0000.jsonl",
        "extract_0001.jsonl",
        *(name for name in by_file if name.startswith("deploy_")),
        "heldout_0000.jsonl",
    }
    learned = {one for name, ids in by_file.items() if "heldout" not in name for one in ids}
    assert not learned & set(by_file["heldout_0000.jsonl"])


@pytest.mark.e2e
@pytest.mark.signals
def test_a_killed_chat_round_ends_as_one_left_alone(finished, model, tmp_path):
    settings = fields(model) | {"evaluate.scorer": str(finished[0].parent / "scorer.py") + ":words"}
    fill(tmp_path / "run")
    interrupted = Interrupted(CONFIG, settings, longest=25.0, seed=3)
    assert interrupted.finish(tmp_path / "run", kills=3) >= 1
    differ = differences(finished[0], tmp_path / "run")
    assert [name for name in differ if not name.startswith("conversations/")] == []
