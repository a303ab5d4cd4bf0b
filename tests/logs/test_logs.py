"""Logs: every format comes back as it was said, bad input is counted, nothing is read twice."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from oel_jax.base.errors import UserError
from oel_jax.data.conversations import ConversationStore
from oel_jax.data.messages import answer_message, user
from oel_jax.data.trajectories import Trajectory, Turn
from oel_jax.data.trajectory_files import write_line
from oel_jax.data.trajectory_schema import encode
from oel_jax.logs import files
from oel_jax.logs.command import main
from oel_jax.logs.formats import examples
from oel_jax.logs.importing import import_logs
from oel_jax.logs.reading import Report, read_conversations
from oel_jax.logs.redaction import Redactor
from oel_jax.runs.workdir import Workdir

ROOT = Path(__file__).resolve().parents[2]


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"".join(
            one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in records
        )
    )
    return str(path)


def read(path, **options):
    """(conversations, report)"""
    report = Report()
    found = list(read_conversations([str(path)], report=report, **options))
    for one in found:
        encode(one)  # each can be stored
    return found, report


def said(*texts, system=""):
    """Messages: the user and the assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def reads(trajectory):
    """(messages read, answer) of every turn."""
    return [
        ([dict(m) for m in point.dialogue.messages], turn.response)
        for point, turn in zip(trajectory.points(), trajectory.turns, strict=True)
    ]


def expected(messages):
    """The same from the messages of a whole conversation."""
    return [
        (messages[:at], m["content"]) for at, m in enumerate(messages) if m["role"] == "assistant"
    ]


# --- formats --------------------------------------------------------------------------------------

SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def as_messages(messages, **more):
    return [{"messages": messages, **more}]


def as_parts(messages, **more):
    said = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return [{"messages": said, **more}]


def as_sharegpt(messages, **more):
    said = [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in messages]
    return [{"conversations": said, **more}]


def as_rows(messages, **more):
    return [{"conversation": messages, "language": "English", "redacted": False, **more}]


def as_pairs(messages, **more):
    """Turn by turn: each request repeats the history."""
    ends = [at for at, m in enumerate(messages) if m["role"] == "assistant"]
    return [
        {
            "request": {"messages": messages[:at], "model": "m", **more},
            "response": {
                "id": f"{messages[at]['content']}-{at}-{len(messages)}",
                "choices": [{"index": 0, "message": messages[at], "finish_reason": "stop"}],
            },
        }
        for at in ends
    ]


def as_stored_pairs(messages, **more):
    """The same with bodies that are stored as text, as some gateways do."""
    return [
        {name: json.dumps(one[name]) for name in ("request", "response")}
        for one in as_pairs(messages, **more)
    ]


def as_growing(messages, **more):
    """OpenAI messages, one line for each answer."""
    ends = [at for at, m in enumerate(messages) if m["role"] == "assistant"]
    return [{"messages": messages[: at + 1], **more} for at in ends]


FORMATS = [as_messages, as_parts, as_sharegpt, as_rows, as_pairs, as_stored_pairs, as_growing]


def random_talk(rng, number):
    words = ["yes", "<|im_end|>", "no\n\n", "√\u2028", "{x}", "a b", "0", "</think>", "\x00?"]
    texts = [f"{number} {' '.join(rng.choices(words, k=rng.randint(1, 5)))} {n}"
             for n in range(2 * rng.randint(1, 5))]  # fmt: skip
    return said(*texts, system=rng.choice(["", "Be kind."]))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("order", ["as written", "shuffled"])
def test_random_conversations_come_back_from_every_format(tmp_path, form, order):
    rng = random.Random(form.__name__)
    talks = [random_talk(rng, number) for number in range(30)]
    records = [record for number, talk in enumerate(talks) for record in form(talk)]
    if order == "shuffled":
        rng.shuffle(records)
    found, report = read(write(tmp_path / "a.jsonl", *records))
    assert not report.skipped and report.conversations == 30
    assert sorted(map(reads, found), key=str) == sorted(map(expected, talks), key=str)
    assert report.turns == sum(len(expected(talk)) for talk in talks)
    assert report.repeated == (
        sum(len(e) * (len(e) - 1) // 2 for e in map(expected, talks))
        if form in (as_pairs, as_stored_pairs, as_growing)
        else 0
    )


def test_all_formats_in_one_file_are_found_line_by_line(tmp_path):
    records = [record for _, record in examples()]
    found, report = read(write(tmp_path / "a.jsonl", *records))
    assert dict(report.formats) == {name: 1 for name, _ in examples()}
    assert report.conversations == 2 and report.repeated == 2  # one has an id of its own
    assert {one.id for one in found if one.conversation} == {"c1"}


# Samples in the shape of public logs, written for this test.
WILDCHAT = {
    "conversation_hash": "cf1267ca6b2f6fccc9c36652a00059a1", "model": "gpt-3.5-turbo-0301",
    "timestamp": "2023-04-09 00:02:53+00:00", "turn": 2, "language": "English", "toxic": False,
    "conversation": [
        {"content": "Hey there", "country": "US", "hashed_ip": "22fd", "language": "English",
         "redacted": False, "role": "user", "toxic": False, "turn_identifier": 1},
        {"content": "Hello!", "country": None, "hashed_ip": None, "language": "English",
         "redacted": False, "role": "assistant", "toxic": False, "turn_identifier": 1,
         "timestamp": "2023-04-09T00:02:50+00:00"},
        {"content": "Which game?", "role": "user", "turn_identifier": 2},
        {"content": "Chess.", "role": "assistant", "turn_identifier": 2},
    ],
    "openai_moderation": [{"categories": {"hate": False}, "category_scores": {"hate": 0.1}}],
    "detoxify_moderation": [{"toxicity": 0.01}], "hashed_ip": "22fd00", "state": "Texas",
    "header": {"accept-language": "en-US", "user-agent": "Mozilla/5.0"},
}  # fmt: skip
LMSYS = {
    "conversation_id": "33f8939c744645eaaaeca7678c1f36ec", "model": "vicuna-13b",
    "conversation": said("What can you do?", "I can talk."), "turn": 1, "language": "English",
    "openai_moderation": [{"flagged": False}], "redacted": True,
}  # fmt: skip
SHARE = {
    "id": "QWJhYvA_0",
    "conversations": [
        {"from": "human", "value": "Summarize"}, {"from": "gpt", "value": "Summary."},
        {"from": "human", "value": "Go on"}, {"from": "gpt", "value": "More."},
    ],
}  # fmt: skip
GATEWAY = {
    "id": "row-7", "created_at": "2026-01-31T13:00:00+01:00",
    "metadata": {"user_id": 1234, "session_id": "s-9"},
    "request": {
        "model": "gpt-x", "temperature": 0.2, "seed": 5, "stream": False, "tools": TOOLS,
        "messages": [
            {"role": "developer", "content": "Use f."},
            {"role": "user", "content": [{"type": "text", "text": "Call"},
                                         {"type": "text", "text": "it"}]},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [
                {"id": "c1", "type": "function", "index": 0,
                 "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ],
    },
    "response": {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1769860800, "model": "gpt-x-1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Two.",
                                             "reasoning_content": "1+1"},
                     "finish_reason": "max_tokens", "logprobs": None}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    },
}  # fmt: skip
FUNCTIONS = {
    "conversations": [
        {"from": "system", "value": "You have tools."}, {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "w", "arguments": {"city": "Bonn"}}'},
        {"from": "observation", "value": "rain"}, {"from": "gpt", "value": "It rains."},
    ],
    "tools": json.dumps([{"name": "w"}]),
}  # fmt: skip


def test_public_formats_in_detail(tmp_path):
    path = write(tmp_path / "a.jsonl", WILDCHAT, LMSYS, SHARE, GATEWAY, FUNCTIONS)
    (wild, lmsys, share, gate, call), report = read(path)
    assert not report.skipped and report.users == 2 and not report.scores
    assert (wild.id, wild.user, wild.policy) == (WILDCHAT["conversation_hash"], "22fd00",
                                                 "gpt-3.5-turbo-0301")  # fmt: skip
    assert [t.time for t in wild.turns] == ["2023-04-09T00:02:50Z", "2023-04-09T00:02:53Z"]
    assert lmsys.id == LMSYS["conversation_id"] and lmsys.policy == "vicuna-13b"
    assert share.id == "QWJhYvA_0" and len(share.turns) == 2 and share.feedback(0) == "Go on"
    assert (gate.user, gate.id, gate.policy) == ("1234", "s-9", "gpt-x-1")
    first, second = gate.turns
    assert first.messages[1] == user("Call\nit") and first.response == ""
    assert first.shown["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    ]
    assert second.response == "<think>\n1+1\n</think>\n\nTwo."
    assert second.shown == answer_message("Two.") and second.id == "chatcmpl-1"
    assert (second.finish, second.time) == ("length", "2026-01-31T12:00:00Z")
    assert second.sampling == {"temperature": 0.2, "seed": 5} and gate.tools == tuple(TOOLS)
    assert [m["role"] for m in call.turns[1].messages] == ["tool"] and call.tools == (
        {"name": "w"},
    )
    assert call.turns[0].shown["tool_calls"][0]["function"]["arguments"] == {"city": "Bonn"}


def test_roles_by_all_their_names(tmp_path):
    names = [("User", "ChatGPT"), ("human", "bard"), ("prompter", "assistant"), ("human", "bing")]
    records = [
        {"conversations": [{"from": a, "value": f"{n}"}, {"from": b, "value": "x"}]}
        for n, (a, b) in enumerate(names)
    ]
    found, report = read(write(tmp_path / "a.jsonl", *records))
    assert len(found) == 4 and not report.skipped


def test_greetings_rows_of_answers_and_unanswered_ends(tmp_path):
    greeting = {"role": "assistant", "content": "Welcome"}
    talk = [greeting, *said("q", "a"), {"role": "assistant", "content": "b"}, *said("r")]
    (one,), report = read(write(tmp_path / "a.jsonl", {"messages": talk}))
    assert reads(one) == [([greeting, user("q")], "a\n\nb")]
    assert dict(report.notes) == {
        "answers in a row, joined to one": 1,
        "last messages without an answer, left out": 1,
    }


def test_further_choices_are_left_out_and_errors_are_said(tmp_path):
    pair = as_pairs(said("q", "a"))[0]
    many = {**pair, "response": {"choices": pair["response"]["choices"] * 3}}
    (one,), report = read(write(tmp_path / "a.jsonl", many))
    assert report.notes == {"further choices of a response, left out": 2}
    bad = {"request": pair["request"], "response": {"error": {"message": "overloaded"}}}
    _, report = read(write(tmp_path / "b.jsonl", bad))
    assert dict(report.skipped) == {"a request that was answered with an error": 1}


def test_our_own_trajectories_and_stores(tmp_path):
    found, _ = read(write(tmp_path / "a.jsonl", WILDCHAT, SHARE))
    with open(tmp_path / "own.jsonl", "wb") as file:
        for one in found:
            write_line(file, one)
    assert read(tmp_path / "own.jsonl")[0] == found
    workdir = Workdir(tmp_path / "w")
    import_logs([str(tmp_path / "a.jsonl")], workdir, redact=None)
    with ConversationStore(workdir.conversations) as store:
        store.append_feedback(found[1].turns[0].id, "too short")
    again, report = read(workdir.conversations)
    assert [one.id for one in again] == [one.id for one in found]
    assert again[1].turns[0].feedback == "too short"
    assert report.formats == {"oel.trajectory/2": 4, "oel.feedback/1": 1}


def test_games_stay_whole(tmp_path):
    golden = ROOT / "tests" / "golden" / "trajectories_schema_1.jsonl"
    found, report = read(golden)
    assert not report.skipped and len({one.id for one in found}) == len(found) == report.records
    again, _ = read(write(tmp_path / "a.jsonl", *[encode(one) for one in found * 2]))
    assert again == found


# --- feedback and scores --------------------------------------------------------------------------


def test_feedback_texts_are_read_and_numbers_never(tmp_path):
    talk = said("q", "a", "r", "b")
    records = [
        {"messages": talk, "feedback": "too long", "rating": 5, "thumbs_up": True, "id": "1"},
        {"messages": talk, "feedback": [None, "good"], "id": "2"},
        {"messages": talk, "feedback": {"text": "fine", "score": 3}, "id": "3"},
        {"messages": talk, "feedback": 4, "id": "4"},
        {"messages": talk, "feedback": "4/5", "userRating": "3 stars", "id": "5"},
        {"messages": talk, "metadata": {"reward": 0.5, "feedback": "from metadata"}, "id": "6"},
    ]
    for number, record in enumerate(records):
        record["conversation_id"] = str(number)
    rated = [dict(m) for m in talk]
    rated[1] |= {"feedback": "first", "score": 1}
    rated[2] |= {"feedback": "said with the next message"}
    records.append({"messages": rated, "conversation_id": "7", "review": {"text": "deep"}})
    path = write(tmp_path / "a.jsonl", *records)
    found, report = read(path, feedback_fields=("feedback", "review.text"))
    assert [[t.feedback for t in one.turns] for one in found] == [
        [None, "too long"], [None, "good"], [None, "fine"], [None, None], [None, None],
        [None, "from metadata"], ["first\nsaid with the next message", "deep"],
    ]  # fmt: skip
    assert dict(report.scores) == {
        "rating": 1, "thumbs_up": 1, "score": 2, "feedback": 2, "userRating": 1, "reward": 1
    }  # fmt: skip
    assert (report.with_feedback, report.followed) == (6, 7)
    text = json.dumps([json.loads(encode(one)) for one in found])
    assert "rating" not in text.lower() and "reward" not in text and "score" not in text


def test_a_field_with_the_name_of_a_score_gives_its_texts_only(tmp_path):
    records = [{"messages": said(str(n), "a"), "review_score": value}
               for n, value in enumerate(["very good", 5, "5", True, None])]  # fmt: skip
    found, report = read(write(tmp_path / "a.jsonl", *records), feedback_fields=["review_score"])
    assert [one.turns[0].feedback for one in found] == ["very good", None, None, None, None]
    assert set(report.scores) == {"review_score"}


def test_approved_answers_are_marked_by_true_alone(tmp_path):
    talk = said("q", "a", "r", "b")
    talk[1]["approved"] = True
    records = [{"messages": talk, "approved": value} for value in (True, 1, "yes", False, None)]
    for number, record in enumerate(records):
        record["conversation_id"] = str(number)
    found, _ = read(write(tmp_path / "a.jsonl", *records))
    assert [[t.approved for t in one.turns] for one in found] == [
        [True, number == 0] for number in range(5)
    ]


# --- bad input ------------------------------------------------------------------------------------

ANSWER = {"role": "assistant", "content": "a"}
BAD = {
    "not JSON": b"{nope}\n",
    "not UTF-8": b'{"messages": "\xff"}\n',
    "no JSON object": [1, 2],
    "no known format": {"text": "hello"},
    "nested too deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "a number that is too large": b'{"messages": ' + b"9" * 5000 + b"}\n",
    "half a surrogate pair, which is no text": {"messages": said("\ud800", "a")},
    "an unknown role": {"messages": [{"role": "judge", "content": "x"}]},
    "an empty message": {"messages": said("", "a")},
    "no answer": {"messages": said("q")},
    "no message of a user": {"messages": [ANSWER]},
    "a message that is no object": {"messages": ["x"]},
    "content that is neither text nor parts": {"messages": [{"role": "user", "content": 3}]},
    "a part of content that is no text": {"messages": [{"role": "user", "content": [{"a": 1}]}]},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
    "audio": {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, ANSWER]},
    "video": {"messages": [{"role": "user", "content": [{"type": "video_url"}]}, ANSWER]},
    "a file": {"messages": [{"role": "user", "content": [{"type": "file"}]}, ANSWER]},
    "tool calls that are no list": {"messages": [*said("q"), {**ANSWER, "tool_calls": "x"}]},
    "a tool call without the name of a function": {
        "messages": [*said("q"), {**ANSWER, "tool_calls": [{"function": {}}]}]
    },
    "a function call that is no JSON": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f("}]
    },
    "a tool or a call that breaks the schema": {
        "messages": [*said("q"), {**ANSWER, "tool_calls": [
            {"function": {"name": "f", "arguments": json.loads("[" * 60 + "]" * 60)}}]}]
    },
    "a request without messages": {"request": {"prompt": "x"}, "response": {"choices": []}},
    "a response without choices": {"request": {"messages": said("q")}, "response": {"x": 1}},
    "a choice without a message": {
        "request": {"messages": said("q")}, "response": {"choices": [{}]}
    },
    "a line of ours that breaks its schema": {"schema": "oel.trajectory/2", "reward": 1},
    "an exchange whose parent is not there": encode(
        Trajectory(policy="p", purpose="deploy", id="x", parent="gone", turns=[
            Turn(messages=[user("a")], response="b", continues=True)])
    ),
    "feedback on an answer that is not there": {
        "schema": "oel.feedback/1", "id": "x", "text": "t", "time": "2026-01-31T12:00:00Z"
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD)
def test_bad_records_are_counted_and_the_others_are_used(tmp_path, reason):
    path = write(tmp_path / "a.jsonl", SHARE, BAD[reason], LMSYS)
    found, report = read(path)
    assert [one.id for one in found] == [SHARE["id"], LMSYS["conversation_id"]]
    assert dict(report.skipped) == {reason: 1}
    if "not there" not in reason:
        (place,) = report.places[reason]
        assert place.startswith(f"{path}:2") and len(place) < len(path) + 200


def test_only_the_first_few_places_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", *[b"{\n"] * 50, SHARE)
    _, report = read(path)
    assert report.skipped == {"not JSON": 50} and len(report.places["not JSON"]) == 3


def test_lines_of_any_length_and_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 2000)
    big = {"messages": said("x" * 3000, "a")}
    path = write(
        tmp_path / "a.jsonl", b"\xef\xbb\xbf", SHARE, b"\n  \n", big, LMSYS, b'{"messages"'
    )
    found, report = read(path)
    assert len(found) == 2
    assert dict(report.skipped) == {"a line of more than 0 MiB": 1, "an unfinished last line": 1}
    assert report.places["a line of more than 0 MiB"] == [f"{path}:4"]


def test_random_damage_never_ends_in_a_traceback(tmp_path):
    rng = random.Random(3)
    lines = b"".join(json.dumps(r).encode() + b"\n" for r in (WILDCHAT, SHARE, GATEWAY, FUNCTIONS))
    for _ in range(150):
        data = bytearray(lines)
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(len(data))] = rng.choice(b'{}[]",:0\\u\xff\x00ntrue')
        read(write(tmp_path / "a.jsonl", bytes(data)))


def strange(rng, depth=0):
    """A random JSON value that looks a little like a log."""
    if depth > 3 or rng.random() < 0.3:
        return rng.choice([None, True, 0, -1.5, 10**30, "", "user", "x", "human", "gpt", [], {}])
    if rng.random() < 0.4:
        return [strange(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    keys = ["messages", "role", "content", "from", "value", "conversation", "conversations", "user",
            "request", "response", "choices", "message", "tool_calls", "function", "name", "tools",
            "feedback", "metadata", "time", "id", "model", "arguments", "type", "text"]  # fmt: skip
    return {key: strange(rng, depth + 1) for key in rng.sample(keys, rng.randint(1, 6))}


def test_strange_records_are_skipped_or_used_but_never_a_traceback(tmp_path):
    rng = random.Random(4)
    records = []
    for one in rng.choices([WILDCHAT, SHARE, GATEWAY, FUNCTIONS, LMSYS], k=500):
        records.append({**one, rng.choice(sorted(one)): strange(rng)})
    records += [strange(rng) for _ in range(500)]
    for record in [one for one in records if isinstance(one, dict) and "messages" in one][:100]:
        record["messages"] = [strange(rng) for _ in range(3)]
    _, report = read(write(tmp_path / "a.jsonl", *records), redact=Redactor())
    assert report.records == 1000 and sum(report.skipped.values()) < 1000


# --- files ----------------------------------------------------------------------------------------


def test_files_globs_directories_and_gzip(tmp_path):
    write(tmp_path / "logs" / "b.jsonl", SHARE)
    write(tmp_path / "logs" / "deep" / "a.ndjson", LMSYS)
    write(tmp_path / "logs" / "notes.txt", b"nothing")
    write(tmp_path / "logs" / ".hidden" / "x.jsonl", WILDCHAT)
    with gzip.open(tmp_path / "logs" / "c.jsonl.gz", "wb") as file:
        file.write(json.dumps(WILDCHAT).encode())
    ids = {one.id for one in read(tmp_path / "logs")[0]}
    assert ids == {SHARE["id"], LMSYS["conversation_id"], WILDCHAT["conversation_hash"]}
    found, report = read(tmp_path / "logs" / "*.jsonl*")
    assert report.files == 2 and len(found) == 2
    patterns = [str(tmp_path / "logs"), str(tmp_path / "logs" / "b.jsonl"), str(tmp_path / "**")]
    report = Report()
    list(read_conversations(patterns, report=report))
    assert report.files == 4 and report.repeated == 0  # each file once
    for pattern in ("nowhere.jsonl", "gs://bucket/x", str(tmp_path / "*.none")):
        with pytest.raises(UserError):
            list(read_conversations(pattern))
    (tmp_path / "empty").mkdir()
    assert read(tmp_path / "empty")[0] == []  # it may grow


def test_damaged_gzip_files(tmp_path):
    records = [SHARE | {"id": str(n), "x": os.urandom(99).hex()} for n in range(99)]
    data = gzip.compress(b"".join(json.dumps(one).encode() + b"\n" for one in records))
    for cut in (data[: len(data) // 2], data[:200] + b"\0" * 99 + data[299:]):
        _, report = read(write(tmp_path / "a.jsonl.gz", cut))
        assert report.skipped["a damaged or cut-off gzip file"] == 1


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [7, 1000, 2**20])
def test_one_array_of_records(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    records = [SHARE | {"id": f"é{n}"} for n in range(7)]
    text = json.dumps(records, indent=indent, ensure_ascii=False)
    path = tmp_path / "a.json"
    path.write_text("\n" + text, encoding="utf-8")
    found, report = read(path)
    assert [one.id for one in found] == [f"é{n}" for n in range(7)] and not report.skipped
    if indent:
        lines = ("\n" + text).split("\n")
        starts = [n for n, line in enumerate(lines, 1) if line == "  {"]
        assert [r.line for r in files.records(path)] == starts
    path.write_text(text[:-20], encoding="utf-8")
    found, report = read(path)
    assert len(found) == 6 and sum(report.skipped.values()) == 1


# --- redaction and import -------------------------------------------------------------------------

PRIVATE = {
    "messages": [
        {"role": "system", "content": "Support of jane@example.org", "name": "joe@example.org"},
        {"role": "user", "content": "I am at 203.0.113.9"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "pay", "arguments": '{"card": 4111111111111111, "n": 12}'}}]},
        {"role": "tool", "content": "sk-abcdefghijklmnop1234"},
        {"role": "assistant", "content": "Call +44 20 7946 0958"},
    ],
    "user": "jane@example.org", "feedback": "mail joe@example.org", "tools": TOOLS,
}  # fmt: skip


def test_nothing_private_is_written(tmp_path):
    path, workdir = write(tmp_path / "a.jsonl", PRIVATE), Workdir(tmp_path / "w")
    report, new = import_logs([path], workdir, redact=Redactor())
    stored = b"".join(file.read_bytes() for file in workdir.conversations.iterdir())
    for word in (b"@", b"203.0", b"4111", b"sk-", b"7946"):
        assert word not in stored
    assert new == 2
    assert report.redacted == {"email": 4, "ip": 1, "card": 1, "key": 1, "phone": 1}
    (one,) = ConversationStore(workdir.conversations).read(on_bad="error")
    assert one.user.startswith("h-")
    assert (
        one.turns[0].shown["tool_calls"][0]["function"]["arguments"]
        == '{"card": "[CARD]", "n": 12}'
    )
    assert one.turns[1].feedback == "mail [EMAIL]"


def test_import_again_adds_what_is_new_only(tmp_path):
    rng = random.Random(5)
    talks = [random_talk(rng, n) for n in range(12)]
    records = [r for n, t in enumerate(talks) for r in FORMATS[n % len(FORMATS)](t)] + [PRIVATE]
    workdir, path = Workdir(tmp_path / "w"), tmp_path / "logs" / "a.jsonl"
    turns = 0
    for part in range(1, len(records) + 1, 5):
        write(path, *records[:part])
        _, new = import_logs([str(path.parent)], workdir, redact=Redactor())
        _, none = import_logs([str(path.parent)], workdir, redact=Redactor())
        assert none == 0
        turns += new
    write(path, *records)
    import_logs([str(path.parent)], workdir, redact=Redactor())
    stored = list(ConversationStore(workdir.conversations).read(on_bad="error"))
    direct, _ = read(path.parent, redact=Redactor())
    assert sorted(map(reads, stored), key=str) == sorted(map(reads, direct), key=str)
    ids = [turn.id for one in stored for turn in one.turns]
    assert len(ids) == len(set(ids)) == sum(len(one.turns) for one in direct)
    assert {one.id for one in stored} == {one.id for one in direct}


@pytest.mark.parametrize("form", [as_pairs, as_growing, as_messages])
@pytest.mark.parametrize("seed", range(6))
def test_import_again_of_private_texts_in_any_order(tmp_path, form, seed):
    """What the store holds is redacted, and the logs are not: they are the same all the same."""
    rng = random.Random(seed)
    talks = []
    for number in range(6):
        texts = [f"{number}.{n} jane{n}@example.org" for n in range(2 * rng.randint(1, 4))]
        talks.append(said(*texts, system="of joe@example.org"))
    records = [record for talk in talks for record in form(talk)]
    workdir, path = Workdir(tmp_path / "w"), tmp_path / "a.jsonl"
    new = 0
    for share in (2, 1, 1):
        rng.shuffle(records)
        some = records[: len(records) // share]
        new += import_logs([write(path, *some)], workdir, redact=Redactor())[1]
    assert new == sum(len(expected(talk)) for talk in talks)
    stored = list(ConversationStore(workdir.conversations).read(on_bad="error"))
    direct, _ = read(path, redact=Redactor())
    assert sorted(map(reads, stored), key=str) == sorted(map(reads, direct), key=str)
    assert all("@" not in json.dumps(reads(one)) for one in stored)


def test_an_exchange_is_known_by_its_own_name_whatever_comes_first(tmp_path):
    pairs = as_pairs(said("q", "a", "r", "b"))
    (one,), _ = read(write(tmp_path / "a.jsonl", *pairs[::-1]))
    assert [turn.id for turn in one.turns] == [pair["response"]["id"] for pair in pairs]


def test_feedback_that_comes_later_is_imported(tmp_path):
    workdir = Workdir(tmp_path / "w")
    path = write(tmp_path / "a.jsonl", SHARE)
    import_logs([path], workdir, redact=None)
    write(tmp_path / "a.jsonl", SHARE | {"feedback": "nice"})
    assert import_logs([path], workdir, redact=None)[1] == 0
    assert import_logs([path], workdir, redact=None)[1] == 0
    (one,) = ConversationStore(workdir.conversations).read()
    assert one.turns[-1].feedback == "nice"


def test_import_beside_a_server(tmp_path):
    workdir = Workdir(tmp_path / "w")
    with ConversationStore(workdir.conversations) as server:
        (one,), _ = read(write(tmp_path / "a.jsonl", LMSYS))
        server.append_exchange(one)
        import_logs([write(tmp_path / "b.jsonl", SHARE)], workdir, redact=None)
        assert len(server.files("exchanges")) == 2
    assert len(list(server.read(on_bad="error"))) == 2


# --- the command ----------------------------------------------------------------------------------


def test_check_says_what_is_there(tmp_path, capsys):
    path = write(tmp_path / "a\x1b.jsonl", WILDCHAT, PRIVATE, {**SHARE, "rating": 3}, b"{\n",
                 BAD["an image"])  # fmt: skip
    assert main(["check", path]) == 0
    out = capsys.readouterr().out
    rows = {line.rsplit("  ", 1)[0].strip(): line.split()[-1] for line in out.splitlines() if line}
    assert rows["records"] == "5" and rows["conversations"] == "3" and rows["answers"] == "6"
    assert rows["users that are named"] == "2" and rows["numbers not read: rating"] == "1"
    assert rows["email"] == "4" and rows["an image"] == "1" and rows["not JSON"] == "1"
    assert f"not JSON: {tmp_path}/a\ufffd.jsonl:4" in out and "\x1b" not in out
    assert main(["check", path, "--json", "--redact=false"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["turns"] == 6 and record["redacted"] == {}
    assert list(tmp_path.iterdir()) == [Path(path)]  # nothing is written


def test_the_command_from_end_to_end(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", WILDCHAT, SHARE)
    words = ["import", path, f"--workdir={tmp_path / 'w'}"]
    assert main(words) == 0 and "4 new answers" in capsys.readouterr().out
    assert main(words) == 0 and "0 new answers" in capsys.readouterr().out
    hook = tmp_path / "h.py"
    hook.write_text("def chess(text):\n    return text.replace('Chess', '[GAME]')\n")
    assert main(["check", path, f"--redact_hook={hook}:chess"]) == 0
    assert "own" in capsys.readouterr().out
    assert main(["check", write(tmp_path / "b.jsonl", b"{\n")]) == 1
    for bad in (["check", "none.jsonl"], ["check", path, "--feedback_fields=,"],
                ["check", path, "--redact=false", f"--redact_hook={hook}:chess"]):  # fmt: skip
        assert main(bad) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_python_m_and_no_jax(tmp_path):
    path = write(tmp_path / "a.jsonl", SHARE)
    code = (
        "import sys; from oel_jax.logs.command import main; main(['check', sys.argv[1]]); "
        "print([m for m in ('jax', 'flax', 'torch', 'textarena') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.stdout.endswith("[]\n"), done.stderr
