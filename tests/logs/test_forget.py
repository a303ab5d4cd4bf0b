"""Forgetting a user or a conversation: stores, rounds, and what was made with them."""

import json
from dataclasses import replace

import pytest
from logs.test_logs import SHARE, WILDCHAT, said, write

from oel_jax.base.errors import UserError
from oel_jax.base.files import write_json
from oel_jax.data import trajectory_files
from oel_jax.data.conversations import ConversationStore
from oel_jax.data.messages import answer_message, user
from oel_jax.data.trajectories import Trajectory, Turn
from oel_jax.data.trajectory_files import TrajectoryStore, write_line
from oel_jax.logs.command import main
from oel_jax.logs.forgetting import Forgotten, forget
from oel_jax.logs.importing import import_logs
from oel_jax.logs.reading import read_conversations
from oel_jax.logs.redaction import Redactor
from oel_jax.runs.workdir import Workdir

LOGS = [
    {"messages": said("q1", "a1"), "user": "ann", "id": "x1", "feedback": "good"},
    {"messages": said("q1", "a1", "q2", "a2"), "user": "ann", "id": "x2"},
    {"messages": said("q1", "a1", "other", "a3"), "user": "ann", "id": "x3"},
    {"messages": said("q1", "a1"), "user": "bob", "id": "y1"},
    {"messages": said("b", "c"), "user": "bob@example.org", "id": "y2"},
    WILDCHAT,
    SHARE,
]


def imported(tmp_path):
    path, workdir = write(tmp_path / "a.jsonl", *LOGS), Workdir(tmp_path / "w")
    import_logs([path], workdir, redact=Redactor())
    return path, workdir


def names(workdir):
    return {turn.id for one in ConversationStore(workdir.conversations).read(on_bad="error")
            for turn in one.turns}  # fmt: skip


def stored_bytes(workdir):
    return b"".join(file.read_bytes() for file in workdir.root.rglob("*.jsonl"))


def test_a_user_goes_and_does_not_come_back(tmp_path):
    path, workdir = imported(tmp_path)
    with ConversationStore(workdir.conversations) as store:
        store.append_feedback("x1", "mine", user="ann")
        store.append_feedback("y1", "of another's answer", user="ann")
        store.append_feedback("y1", "stays", user="bob")
    before = names(workdir)
    removed = forget(workdir, user="ann")
    assert (removed.conversations, removed.exchanges, removed.comments) == (1, 3, 2)
    assert names(workdir) == before - {"x1", "x2", "x3"} and not removed.policies
    for word in (b"ann", b"q2", b"other", b"mine", b"another"):
        assert word not in stored_bytes(workdir)
    memory = (workdir.conversations / "forgotten.json").read_text()
    assert "ann" not in memory and "x1" not in memory
    report, new = import_logs([path], workdir, redact=Redactor())
    assert new == 0 and report.forgotten >= 3 and names(workdir) == before - {"x1", "x2", "x3"}
    nobody = [{k: v for k, v in LOGS[1].items() if k != "user"}]  # the same text without its user
    assert import_logs([write(tmp_path / "b.jsonl", *nobody)], workdir, redact=None)[1] <= 1
    with ConversationStore(workdir.conversations) as store:  # who comes back is welcome
        turn = Turn(messages=[user("new")], response="yes")
        store.append_exchange(
            Trajectory(policy="p", purpose="deploy", id="z", user="ann", turns=[turn])
        )
    assert "z" in names(workdir)


@pytest.mark.parametrize("name", [SHARE["id"], WILDCHAT["conversation_hash"], "x2", "x1"])
def test_a_conversation_goes_with_all_its_branches(tmp_path, name):
    path, workdir = imported(tmp_path)
    total = len(names(workdir))
    gone = {SHARE["id"]: 2, WILDCHAT["conversation_hash"]: 2, "x2": 3, "x1": 3}[name]
    removed = forget(workdir, conversation=name)
    assert removed.exchanges == gone and len(names(workdir)) == total - gone
    longer = said("Hey there", "Hello!", "Which game?", "Chess.", "And now?", "Go.")
    again = said("q1", "a1", "q2", "a2", "q3", "a4")
    more = [
        WILDCHAT | {"conversation": longer},
        {"messages": again, "user": "ann", "id": "x9"},
    ]
    write(tmp_path / "a.jsonl", *LOGS, *more)
    import_logs([path], workdir, redact=Redactor())
    back = names(workdir)
    if name.startswith("x"):
        assert not back & {"x1", "x2", "x3", "x9"}  # nor what continues it
    elif name == WILDCHAT["conversation_hash"]:
        assert b"Chess" not in stored_bytes(workdir)
    with pytest.raises(UserError, match="holds nothing of the conversation"):
        forget(workdir, conversation=name)


def test_ids_that_were_hidden_are_found_by_their_own_name(tmp_path):
    path, workdir = imported(tmp_path)
    assert forget(workdir, user="bob@example.org").exchanges == 1
    assert import_logs([path], workdir, redact=Redactor())[1] == 0
    assert import_logs([path], workdir, redact=None)[1] == 0


def test_what_the_server_wrote_with_parents_goes_too(tmp_path):
    workdir = Workdir(tmp_path / "w")
    messages = [user("secret one")]
    with ConversationStore(workdir.conversations) as store:
        for number in range(4):
            turn = Turn(messages=messages, response=f"r{number}")
            one = Trajectory(policy="p", purpose="deploy", id=f"c{number}", turns=[turn])
            assert store.append_exchange(one).parent == (f"c{number - 1}" if number else None)
            messages = [*messages, answer_message(f"r{number}"), user(f"q{number}")]
        turn = Turn(messages=[user("else")], response="r")
        store.append_exchange(Trajectory(policy="p", purpose="deploy", id="d", turns=[turn]))
        with pytest.raises(UserError, match=r"exchanges_0000\.jsonl is being written"):
            forget(workdir, conversation="c2")
    assert forget(workdir, conversation="c2").exchanges == 4
    assert names(workdir) == {"d"} and b"secret" not in stored_bytes(workdir)


@pytest.fixture
def run(tmp_path):
    """A workdir with two finished rounds on conversations: which ones is known."""
    _, workdir = imported(tmp_path)
    with workdir.open({"rounds": 2}):
        for number in (1, 2):
            talks = list(ConversationStore(workdir.conversations).read())
            ann = [one for one in talks if one.user == "ann"]
            others = [one for one in talks if one.user != "ann"]
            store = TrajectoryStore(workdir.trajectories(number))
            store.directory.mkdir(parents=True)
            contents = {
                "extract_0000.jsonl": [*others[:2], ann[0]] if number == 1 else others,
                "extract_0001.jsonl": others[:3],
                "deploy_0000.jsonl": [*ann, *others] if number == 1 else others,
                "deploy_0001.jsonl": ann if number == 1 else others[:1],
            }
            for name, found in contents.items():
                with open(store.directory / name, "wb") as file:
                    for one in found:
                        purpose = name.partition("_")[0]
                        write_line(file, replace(one, purpose=purpose, round=number))
            for chain in (0, 1):
                for step in (1, 2, 3):
                    write_json(workdir.knowledge_step(number, chain, step), {"step": step})
            write_json(workdir.knowledge(number), {"texts": []})
            write_json(workdir.evaluation(number, "x").with_suffix(".samples.json"), [])
            workdir.policy(number).mkdir()
            (workdir.policy(number) / "config.json").write_text("{}")
            workdir.finish(number, "deploy", [store.directory], 1.0)
            workdir.finish(number, "consolidate", [workdir.policy(number)], 1.0)
    return workdir


def test_rounds_lose_it_too_and_what_was_made_with_it_is_named(run, capsys):
    assert main(["forget", "--user=ann", f"--workdir={run.root}", "--json"]) == 0
    removed = json.loads(capsys.readouterr().out)
    assert removed["trajectories"] == 5 and removed["exchanges"] == 3
    root = str(run.root)
    named = [path.removeprefix(root + "/") for path in removed["knowledge"]]
    assert named == [
        "round_001/knowledge/chain_00/step_003.json",
        "round_001/knowledge/knowledge.json",
        "round_002/knowledge/knowledge.json",
    ]
    policies = [path.removeprefix(root + "/") for path in removed["policies"]]
    assert policies == ["round_001/policy", "round_002/policy"]
    assert len(removed["texts"]) == 2 and b'"ann"' not in stored_bytes(run)
    with Workdir(run.root).open({"rounds": 2}) as workdir:  # the stages are finished as before
        for number in (1, 2):
            assert workdir.finished(number, "deploy") and workdir.finished(number, "consolidate")
            workdir.verify(number, "deploy")
    files = sorted(p.name for p in run.trajectories(1).iterdir())
    assert files == ["deploy_0000.jsonl", "extract_0000.jsonl", "extract_0001.jsonl"]
    assert all(one.user != "ann" for one in trajectory_files.read(run.trajectories(1) / files[0]))


def test_the_command_says_what_cannot_be_unlearned(run, capsys):
    assert main(["forget", "--conversation=x2", f"--workdir={run.root}"]) == 0
    out = capsys.readouterr().out
    assert "trajectories removed from rounds" in out and "round_002/policy" in out
    assert "These were not changed." in out


def test_a_conversation_that_only_a_round_holds(run):
    for file in run.conversations.glob("*.jsonl"):
        file.unlink()
    assert forget(run, user="ann").trajectories == 5
    found = list(read_conversations(str(run.root.parent / "a.jsonl"), forgotten=Forgotten.of(run)))
    assert found and all(one.user != "ann" for one in found)


def test_bad_lines_are_kept_and_named(tmp_path):
    _, workdir = imported(tmp_path)
    file = workdir.conversations / "exchanges_0000.jsonl"
    file.write_bytes(file.read_bytes() + b"{bad}\n")
    removed = forget(workdir, user="ann")
    assert [place.rpartition(":")[0] for place in removed.bad_lines] == [str(file)]
    assert file.read_bytes().endswith(b"{bad}\n")


def test_what_is_refused(tmp_path, capsys):
    _, workdir = imported(tmp_path)
    where = f"--workdir={workdir.root}"
    for words in ([], ["--user=a", "--conversation=b"], ["--user="], ["--user=nobody"]):
        assert main(["forget", where, *words]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert not (workdir.conversations / "forgotten.json").exists()
    assert main(["forget", f"--workdir={tmp_path / 'none'}", "--user=a"]) == 2
    with workdir.open({"rounds": 1}):
        assert main(["forget", where, "--user=ann"]) == 2
    assert "in use" in capsys.readouterr().err
    (workdir.conversations / "forgotten.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        Forgotten.of(workdir)
