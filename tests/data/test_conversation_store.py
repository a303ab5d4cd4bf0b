"""The store of conversations: pieces put together, crashes, several writers, redaction."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from tiers import HANG

from oel_jax.base.errors import UserError
from oel_jax.data import trajectory_files
from oel_jax.data.conversations import ConversationStore
from oel_jax.data.joining import Joiner
from oel_jax.data.messages import answer_message, user
from oel_jax.data.trajectories import Trajectory, Transcript, Turn
from oel_jax.data.trajectory_files import write_line
from oel_jax.data.trajectory_schema import decode_line, encode

ROOT = Path(__file__).resolve().parents[2]


def exchange(name, messages, response, **facts):
    """One request with all its messages, and its answer."""
    head = {key: facts.pop(key) for key in ("user", "policy", "tools") if key in facts}
    turn = Turn(messages=messages, response=response, **facts)
    return Trajectory(
        **{"policy": "round_000", "purpose": "deploy", "id": name, "turns": [turn], **head}
    )


def talk(name, length, words="x", **facts):
    """The exchanges of a conversation as a server sees them, and what was read at each."""
    messages, ids, pieces = [], [], []
    for number in range(length):
        messages = [*messages, user(f"{words} question {number} " + "y" * 30)]
        ids = [*ids, *range(number, number + 30)]
        one = exchange(
            f"{name}.{number}", messages, f"answer {number}",
            prompt_ids=ids, response_ids=[7, number], **facts,
        )  # fmt: skip
        pieces.append(one)
        messages = [*messages, answer_message(f"answer {number}")]
        ids = [*ids, 7, number]
    return pieces


def points(trajectory):
    return [(tuple(p.dialogue.messages), p.prompt_ids) for p in trajectory.points()]


def whole(pieces):
    """What a conversation of these exchanges must read."""
    return [points(piece)[0] for piece in pieces]


def store_with(directory, *pieces):
    with ConversationStore(directory) as store:
        for piece in pieces:
            store.append_exchange(piece)
    return ConversationStore(directory)


# --- put together ---------------------------------------------------------------------------------


def test_exchanges_become_conversations_again(tmp_path):
    first, second = talk("a", 5), talk("b", 3, words="other")
    mixed = [piece for pair in zip(first, second, strict=False) for piece in pair] + first[3:]
    one, two = store_with(tmp_path, *mixed).read()
    assert [one.id, two.id] == ["a.0", "b.0"]
    assert points(one) == whole(first) and points(two) == whole(second)
    assert [turn.id for turn in one.turns] == [f"a.{n}" for n in range(5)]
    assert [turn.response_ids for turn in one.turns] == [(7, n) for n in range(5)]


def test_the_space_is_linear(tmp_path):
    sizes = []
    for length in (50, 100, 200):
        store = store_with(tmp_path / str(length), *talk("a", length))
        (file,) = store.files("exchanges")
        sizes.append(file.stat().st_size)
        assert points(*store.read()) == whole(talk("a", length))
    assert sizes[2] - sizes[1] < 2.5 * (sizes[1] - sizes[0]) and sizes[2] < 800 * 200


def test_a_server_that_was_started_again_goes_on_with_the_conversation(tmp_path):
    pieces = talk("a", 4)
    for piece in pieces:
        store = store_with(tmp_path, piece)
    lines = [json.loads(line) for line in store.files("exchanges")[0].read_bytes().splitlines()]
    assert all("parent" not in line for line in lines)
    (one,) = store.read()
    assert points(one) == whole(pieces)


def test_an_answer_that_was_made_again_is_a_conversation_of_its_own(tmp_path):
    pieces = talk("a", 3)
    again = exchange("c", pieces[1].turns[0].messages, "another", prompt_ids=[1], response_ids=[2])
    more = exchange("d", [*again.turns[0].messages, answer_message("another"), user("?")], "so")
    one, two = store_with(tmp_path, *pieces, again, more).read()
    assert points(one) == whole(pieces)
    assert two.id == "c" and points(two) == whole([again, more])
    assert len({turn.id for t in (one, two) for turn in t.turns}) == 5


def test_an_edited_history_begins_anew(tmp_path):
    pieces = talk("a", 2)
    edited = exchange("e", [user("x"), answer_message("edited"), user("y")], "z")
    one, two = store_with(tmp_path, *pieces, edited).read()
    assert points(one) == whole(pieces) and points(two) == whole([edited])


def test_the_same_words_of_two_users_stay_apart(tmp_path):
    mine, yours = talk("a", 3, user="me"), talk("b", 3, user="you")
    mixed = [piece for pair in zip(mine, yours, strict=True) for piece in pair]
    one, two = store_with(tmp_path, *mixed).read()
    assert [one.user, two.user] == ["me", "you"]
    assert [t.id for t in two.turns] == ["b.0", "b.1", "b.2"]


def test_equal_exchanges_of_nobody_in_particular_are_all_kept(tmp_path):
    pieces = [exchange(f"n{n}", [user("Hi")], "Hello") for n in range(3)]
    longer = exchange("m", [user("Hi"), answer_message("Hello"), user("?")], "!")
    found = list(store_with(tmp_path, *pieces, longer).read())
    assert sorted(turn.id for one in found for turn in one.turns) == ["m", "n0", "n1", "n2"]
    assert [len(one.turns) for one in found] == [1, 1, 2]


def test_policies_tools_and_facts_come_back(tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, None]}}}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "2", "tool_call_id": "1"}
    facts = {"time": "2026-01-31T12:00:00Z", "sampling": {"seed": 3, "top_p": 0.9}}
    first = exchange(
        "a", [user("q")], "<call>", answer=answer, finish="tool_calls", tools=tools, **facts
    )
    second = exchange(
        "b", [user("q"), answer, result], "two", policy="round_001", finish="stop", tools=tools
    )
    (one,) = store_with(tmp_path, first, second).read()
    assert one.policy == "round_000" and one.tools == tuple(tools)
    assert one.turns[0] == replace(first.turns[0], id="a")
    assert one.turns[1].policy == "round_001" and one.turns[1].messages == (result,)
    assert points(one) == whole([first, second])


def test_feedback_finds_its_turn_before_and_after_it(tmp_path):
    with ConversationStore(tmp_path) as store:
        store.append_feedback("a.1", "too long", user="u", time="2026-01-31T12:00:00Z")
        for piece in talk("a", 3):
            store.append_exchange(piece)
        for text in ("good", "good", "thanks"):
            store.append_feedback("a.2", text)
        store.append_feedback("nobody", "?")
    (one,) = store.read()
    assert [turn.feedback for turn in one.turns] == [None, "too long", "good\nthanks"]
    assert one.feedback(0).startswith("x question 1")  # what the user said next


def conversations_of(seed):
    """Random conversations that share beginnings, as trees: name -> messages, answer, parent."""
    rng = random.Random(seed)
    pieces = []
    for number in range(rng.randint(1, 25)):
        old = rng.choice(pieces) if pieces and rng.random() < 0.7 else None
        before = () if old is None else (*old.turns[0].messages, old.turns[0].shown)
        new = [user(rng.choice("abc")) for _ in range(rng.randint(1, 2))]
        who = rng.choice([None, "u", "v"]) if old is None else old.user
        pieces.append(exchange(f"n{number}", [*before, *new], rng.choice("xyz"), user=who))
    return pieces


@pytest.mark.parametrize("seed", range(40))
def test_any_tree_of_exchanges_is_read_as_it_was(tmp_path, seed):
    """Every exchange is a turn once, and reads what it read."""
    pieces = conversations_of(seed)
    if seed % 2:
        store = store_with(tmp_path, *pieces)
    else:
        for piece in pieces:
            store = store_with(tmp_path, piece)
    found = {}
    for one in store.read(on_bad="error"):
        assert one.turns[0].id is not None and not one.turns[0].continues
        assert all(turn.continues for turn in one.turns[1:])
        for turn, point in zip(one.turns, one.points(), strict=True):
            assert turn.id not in found
            found[turn.id] = (one.user, tuple(point.dialogue.messages), turn.response)
    assert found == {
        p.id: (p.user, tuple(p.turns[0].messages), p.turns[0].response) for p in pieces
    }


@pytest.mark.parametrize("seed", range(20))
def test_reading_a_snapshot_gives_the_conversations_again(tmp_path, seed):
    """Whole conversations written to a file and joined again are the same."""
    found = list(store_with(tmp_path, *conversations_of(seed)).read())
    joiner = Joiner()
    for one in (*found, *found):
        joiner.add(one)
    assert list(joiner.conversations()) == found
    assert joiner.repeated == sum(len(one.turns) for one in found)
    with open(tmp_path / "snapshot.jsonl", "wb") as file:
        for one in found:
            write_line(file, one)
    assert trajectory_files.read(tmp_path / "snapshot.jsonl") == found


def test_pieces_may_come_in_any_order(tmp_path):
    pieces = talk("a", 6)
    (file,) = store_with(tmp_path, *pieces).files("exchanges")
    lines = file.read_bytes().splitlines(keepends=True)
    for seed in range(10):
        random.Random(seed).shuffle(lines)
        file.write_bytes(b"".join(lines))
        (one,) = ConversationStore(tmp_path).read(on_bad="error")
        assert points(one) == whole(pieces)


def test_a_piece_without_its_parent_is_left_out_and_said(tmp_path, caplog):
    (file,) = store_with(tmp_path, *talk("a", 3), *talk("b", 1, words="o")).files("exchanges")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[1:]))
    assert [one.id for one in ConversationStore(tmp_path).read()] == ["b.0"]
    assert "left out 2 exchanges whose parents" in caplog.text


def test_new_exchanges_and_comments_since_a_mark():
    joiner = Joiner()
    old, new = talk("a", 2), talk("a", 4)
    for piece in old:
        joiner.add(piece)
    mark = joiner.mark()
    for piece in new:
        joiner.add(piece)
    joiner.comment("a.0", "long")
    joiner.comment("a.3", "short")
    fresh = [decode_line(line) for line, _ in joiner.lines(mark)]
    assert [(one.id, one.parent) for one in fresh] == [("a.2", "a.1"), ("a.3", "a.2")]
    assert fresh[1].turns[0].feedback == "short"
    assert list(joiner.comments(mark)) == [("a.0", "long")]


# --- the schema -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parent": "a"}, "its first turn continues"),
        ({"user": ""}, "user must not be empty"),
        ({"conversation": 3}, "conversation must be a string"),
        ({"time": "yesterday"}, "time must be a time in UTC"),
        ({"time": "2026-01-31T12:00:00+02:00"}, "time must be a time in UTC"),
        ({"finish": "error"}, "finish must be one of stop, length"),
        ({"sampling": [1]}, "sampling must be a JSON object"),
        ({"policy": ""}, "policy must not be empty"),
        ({"id": 3}, "id must be a string"),
        ({"score": 3}, "no scores"),
    ],
)
def test_bad_facts_are_refused(tmp_path, changes, message):
    record = json.loads(encode(exchange("x", [user("a")], "b")))
    top = {
        key: value for key, value in changes.items() if key in ("parent", "user", "conversation")
    }
    record |= top
    record["turns"][0] |= {key: value for key, value in changes.items() if key not in top}
    path = tmp_path / "exchanges_0000.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=rf"exchanges_0000\.jsonl:1: .*{message}"):
        list(ConversationStore(tmp_path).read(on_bad="error"))
    assert list(ConversationStore(tmp_path).read()) == []


def test_what_an_exchange_read_is_not_guessed(tmp_path):
    (file,) = store_with(tmp_path, *talk("a", 2)).files("exchanges")
    _, second = trajectory_files.read(file)
    assert second.parent == "a.0" and len(second.turns[0].messages) == 1
    with pytest.raises(ValueError, match="continues 'a.0'"):
        list(second.points())


def test_transcripts_take_the_new_facts():
    transcript = Transcript()
    turn = transcript.add([user("a")], "b", id="x", finish="stop", time="2026-01-31T12:00:00Z")
    assert (turn.id, turn.finish) == ("x", "stop")


# --- crashes, disks, writers ----------------------------------------------------------------------


def test_every_torn_end_is_cut_off(tmp_path, caplog):
    store = store_with(tmp_path, *talk("a", 2))
    (file,) = store.files("exchanges")
    content = file.read_bytes()
    start = content.index(b"\n") + 1
    for end in (*range(start + 1, len(content) - 1, 7), len(content) - 2):
        file.write_bytes(content[:end])
        assert [len(one.turns) for one in store.read(on_bad="error")] == [1]
        store_with(tmp_path, talk("a", 2)[1])
        (one,) = store.read(on_bad="error")
        assert points(one) == whole(talk("a", 2))
        assert file.read_bytes()[:start] == content[:start]
    assert "cut off a damaged last line" in caplog.text


def test_long_last_lines_and_whole_ones_without_newline(tmp_path):
    pieces = [exchange("a", [user("x" * 200_000)], "y"), exchange("b", [user("x")], "z")]
    (file,) = store_with(tmp_path, *pieces).files("exchanges")
    content = file.read_bytes()
    for cut in (content[:-1], content[:150_000], content + b"\0" * 5000, content + b"{}"):
        file.write_bytes(cut)
        store_with(tmp_path, exchange("c", [user("new")], "z"))
        ids = [one.id for one in ConversationStore(tmp_path).read()]
        assert ids == (["c"] if len(cut) == 150_000 else ["a", "b", "c"])


def test_a_file_of_somebody_else_is_not_touched(tmp_path):
    file = tmp_path / "exchanges_0000.jsonl"
    file.write_bytes(b"my notes")
    with pytest.raises(UserError, match=r"exchanges_0000\.jsonl is no file of a store"):
        store_with(tmp_path, exchange("a", [user("x")], "y"))
    assert file.read_bytes() == b"my notes"


def test_two_writers_take_two_numbers_and_both_are_read(tmp_path):
    with ConversationStore(tmp_path) as one, ConversationStore(tmp_path) as two:
        for first, second in zip(talk("a", 2), talk("b", 2, words="o"), strict=True):
            one.append_exchange(first)
            two.append_exchange(second)
        assert [f.name for f in one.files("exchanges")] == [
            "exchanges_0000.jsonl", "exchanges_0001.jsonl"
        ]  # fmt: skip
        assert [t.id for t in two.read()] == ["a.0", "b.0"]  # while both write
    store_with(tmp_path, exchange("c", [user("x")], "y"))
    assert b'"c"' in (tmp_path / "exchanges_0000.jsonl").read_bytes()


def test_full_files_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("oel_jax.data.conversations._FILE_BYTES", 500)
    pieces = talk("a", 6)
    store = store_with(tmp_path, *pieces)
    assert len(store.files("exchanges")) > 2
    assert points(*store.read()) == whole(pieces)


def test_reading_an_empty_or_missing_store(tmp_path):
    store = ConversationStore(tmp_path / "none")
    assert list(store.read()) == [] and not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="on_bad"):
        list(store.read(on_bad="ignore"))


def test_what_readers_would_refuse_is_not_written(tmp_path):
    with ConversationStore(tmp_path) as store:
        for bad in (
            exchange("a", [user("\ud800")], "y"),
            exchange("", [user("x")], "y"),
            exchange(None, [user("x")], "y"),
            exchange("a", [], "y"),
        ):
            with pytest.raises(ValueError):
                store.append_exchange(bad)
        for words in (("", "x"), ("a", ""), ("a", "\ud800"), ("a", 5)):
            with pytest.raises((ValueError, TypeError)):
                store.append_feedback(*words)
        store.append_exchange(exchange("a", [user("x")], "y"))
    assert [one.id for one in store.read(on_bad="error")] == ["a"]


def run_python(code, *arguments):
    begin = (
        "import sys; sys.path.append('tests')\nfrom tests.data.test_conversation_store import *\n"
    )
    program = begin + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip


def test_a_killed_server_loses_nothing_that_it_finished(tmp_path):
    done = run_python(
        """
        store = ConversationStore(sys.argv[1], sync_every=1000)
        for number, piece in enumerate(talk("a", 40)):
            store.append_exchange(piece)
            store.append_feedback(piece.id, f"so {number}")
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (one,) = ConversationStore(tmp_path).read(on_bad="error")
    assert points(one) == whole(talk("a", 40))
    assert [turn.feedback for turn in one.turns] == [f"so {n}" for n in range(40)]
    store_with(tmp_path, talk("b", 1)[0])  # the lock went with the process
    assert len(ConversationStore(tmp_path).files("exchanges")) == 1


def test_a_full_disk_is_said_and_the_store_stays_usable(tmp_path):
    """A file size limit acts as the full disk: the failing write is a partial one."""
    done = run_python(
        """
        import resource
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        store, pieces = ConversationStore(sys.argv[1]), talk("a", 4)
        store.append_exchange(pieces[0])
        size = os.path.getsize(sys.argv[1] + "/exchanges_0000.jsonl")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, hard))
        for piece in pieces[1:3]:
            try:
                store.append_exchange(piece)
            except UserError as error:
                print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        store.append_exchange(pieces[3])
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exchanges_0000.jsonl: File too large; make room on the disk") == 2
    (one,) = ConversationStore(tmp_path).read(on_bad="error")
    assert points(one)[0] == whole(talk("a", 1))[0]
    assert [turn.id for turn in one.turns] == ["a.0", "a.3"]
    assert points(one)[1] == points(talk("a", 4)[3])[0]  # what was not written is in the messages


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/store cannot be made"):
        store_with(tmp_path / "file" / "store", exchange("a", [user("x")], "y"))


def test_threads_share_a_store(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ConversationStore(tmp_path, sync_every=100) as store, ThreadPoolExecutor(8) as pool:
        talks = [talk(f"t{n}", 5, words=str(n)) for n in range(16)]
        list(pool.map(lambda pieces: [store.append_exchange(p) for p in pieces], talks))
    found = {one.id: points(one) for one in store.read(on_bad="error")}
    assert found == {f"t{n}.0": whole(pieces) for n, pieces in enumerate(talks)}


# --- redaction ------------------------------------------------------------------------------------


def hide(text):
    """A redactor: 'secret' is replaced."""
    return text.replace("secret", "[X]"), {"secret": text.count("secret")}


def test_nothing_is_written_before_it_is_redacted(tmp_path):
    call = {"id": "1", "function": {"name": "f", "arguments": '{"secret": ["secret", 1]}'}}
    answer = {"role": "assistant", "content": "a secret", "tool_calls": [call]}
    messages = [{"role": "system", "content": "the secret"}, user("secret?")]
    first = exchange("a", messages, "secret!", answer=answer, prompt_ids=[1, 2], response_ids=[3],
                     user="secret@x")  # fmt: skip
    result = {"role": "tool", "content": "secret", "tool_call_id": "1", "name": "f"}
    second = exchange("b", [*messages, answer, result], "done", user="secret@x")
    with ConversationStore(tmp_path, redactor=hide) as store:
        store.append_exchange(first)
        written = store.append_exchange(second)
        store.append_feedback("b", "no secret", user="secret@x")
    assert written.parent == "a"
    for file in tmp_path.iterdir():
        assert b"secret" not in file.read_bytes()
    (one,) = store.read(on_bad="error")
    assert one.user.startswith("h-") and one.turns[0].prompt_ids is None
    assert json.loads(one.turns[0].answer["tool_calls"][0]["function"]["arguments"]) == {
        "[X]": ["[X]", 1]
    }
    assert one.turns[1].feedback == "no [X]" and len(one.turns) == 2
    assert store.redacted["secret"] >= 8


def test_ids_stay_what_feedback_and_forgetting_name(tmp_path):
    """An id that looks like a key is still the id that a client knows."""
    from oel_jax.logs.redaction import Redactor

    name, who = "chatcmpl-9aBcD3fGh1JkL2mNoP4qRsT5uVwX", "22fd00" + "0a" * 29
    with ConversationStore(tmp_path, redactor=Redactor()) as store:
        store.append_exchange(exchange(name, [user("x")], "y", user=who))
        store.append_feedback(name, "mail a@b.org", user="a@b.org")
    (one,) = store.read(on_bad="error")
    assert (one.id, one.user, one.turns[0].feedback) == (name, who, "mail [EMAIL]")
    assert b"a@b" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_a_damaged_store_is_read_but_for_the_bad_lines(tmp_path, caplog):
    (file,) = store_with(tmp_path, *talk("a", 1), *talk("b", 1, words="o")).files("exchanges")
    one, two = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(one + b"{bad}\n" + b'{"schema": "x"}\n' + b"\xff\n" + two)
    with caplog.at_level(logging.WARNING):
        assert [t.id for t in ConversationStore(tmp_path).read()] == ["a.0", "b.0"]
    for number in (2, 3, 4):
        assert f"exchanges_0000.jsonl:{number}: skipped" in caplog.text
    assert os.path.getsize(file) > 0
