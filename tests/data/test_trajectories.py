"""Trajectory files: schema, bad input, crashes (spec 7)."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from tiers import HANG

from oel_jax.base.errors import UserError
from oel_jax.data import trajectory_files
from oel_jax.data.messages import Context, user
from oel_jax.data.trajectories import Trajectory, Transcript, Turn, decision_points
from oel_jax.data.trajectory_files import TrajectoryStore, TrajectoryWriter
from oel_jax.data.trajectory_schema import encode

ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests" / "golden" / "trajectories_schema_1.jsonl"


def make_turn(**changes):
    values = {
        "messages": [user("board <|im_end|> √\u2028\x00")],
        "prompt_ids": [1, 2, 3],
        "response": 'I "go"\n[right]',
        "response_ids": [4, 5],
        "action": "[right]",
        "observation": "",
    }
    return Turn(**{**values, **changes})


def make_game(seed=7, turns=None, **changes):
    values = {
        "game": "frozen_lake",
        "seed": seed,
        "policy": "round_001",
        "round": 1,
        "purpose": "deploy",
        "chain": 3,
        "turns": [make_turn(), make_turn(messages=[user("later")])] if turns is None else turns,
        "outcome": "Summary:\n",
    }
    return Trajectory(**{**values, **changes})


def record(*without, **changes):
    """A good line as plain JSON data, without some keys, with changes at the top."""
    data = {**json.loads(encode(make_game())), **changes}
    return {key: value for key, value in data.items() if key not in without}


def turn_record(*without, **changes):
    turn = record()["turns"][0] | changes
    return record(turns=[{key: value for key, value in turn.items() if key not in without}])


def message_record(**message):
    return turn_record(messages=[message])


def second_turn(**changes):
    """A line whose second turn continues the first."""
    first, second = record()["turns"]
    return record(turns=[first, second | {"continues": True} | changes])


def write(path, *games):
    with TrajectoryWriter(path) as writer:
        for game in games:
            writer.write(game)
    return path


# --- round trip and order -------------------------------------------------------------------------


def test_round_trip(tmp_path):
    games = [
        make_game(1),
        make_game(2, purpose="extract", chain=50, wrapper="grid"),
        make_game(2**63 - 1, turns=[make_turn(response="", response_ids=[], action="")]),
        make_game(3, context=Context("knowledge", "K <think>", "system"), purpose="demonstrate"),
    ]
    path = write(tmp_path / "a.jsonl", *games)
    found = trajectory_files.read(path)
    assert found == sorted(games, key=lambda g: (g.chain, g.seed))
    assert path.read_bytes().count(b"\n") == 4


def test_write_line_is_what_the_writer_writes(tmp_path):
    with open(tmp_path / "plain.jsonl", "wb") as file:
        trajectory_files.write_line(file, make_game())
    write(tmp_path / "a.jsonl", make_game())
    assert (tmp_path / "plain.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    assert json.loads((tmp_path / "a.jsonl").read_text())["schema"] == "oel.trajectory/2"


def test_numpy_ids_become_integers(tmp_path):
    turn = make_turn(prompt_ids=np.arange(3, dtype=np.int32), response_ids=np.array([2**31 - 1]))
    (game,) = trajectory_files.read(write(tmp_path / "a.jsonl", make_game(turns=[turn])))
    assert game.turns[0].prompt_ids == (0, 1, 2) and game.turns[0].response_ids == (2**31 - 1,)
    with pytest.raises(TypeError):
        make_turn(prompt_ids=[1.0])


def test_reading_order_does_not_depend_on_finishing_order(tmp_path):
    games = [make_game(seed, chain=chain) for chain in (1, 2) for seed in (3, 10, 20)]
    path = write(tmp_path / "a.jsonl", *games[::-1])
    assert trajectory_files.read(path) == games


def test_decision_points_are_ordered_by_trajectory_then_turn():
    games = [make_game(9), make_game(1, turns=[make_turn(messages=[user("only")])])]
    found = [
        (p.dialogue.messages[-1]["content"], p.prompt_ids, p.episode, p.turn)
        for p in decision_points(games)
    ]
    first = games[0].turns[0].messages[0]["content"]
    assert found == [
        (first, (1, 2, 3), 0, 0),
        ("later", (1, 2, 3), 0, 1),
        ("only", (1, 2, 3), 1, 0),
    ]
    assert decision_points([]) == []


# --- conversations --------------------------------------------------------------------------------


def talk(turns=3, size=20, **changes):
    """A conversation that grows, as it was read: (trajectory, messages and ids of every turn)."""
    transcript, messages, ids, read = Transcript(), [], [], []
    for number in range(turns):
        messages = [*messages, user(f"{number} <|im_end|> " + "x" * size)]
        ids = [*ids, *range(number, number + size)]
        read.append((tuple(messages), tuple(ids)))
        transcript.add(messages, f"answer {number}", prompt_ids=ids, response_ids=[7, number])
        messages = [*messages, {"role": "assistant", "content": f"answer {number}"}]
        ids = [*ids, 7, number]
    values = {"policy": "round_000", "purpose": "deploy", "id": "talk"} | changes
    return Trajectory(turns=transcript.turns, **values), read


def read_of(trajectory):
    return [(tuple(p.dialogue.messages), p.prompt_ids) for p in trajectory.points()]


def test_a_growing_conversation_is_read_as_it_was(tmp_path):
    trajectory, read = talk()
    assert read_of(trajectory) == read
    (back,) = trajectory_files.read(write(tmp_path / "a.jsonl", trajectory))
    assert back == trajectory and read_of(back) == read
    assert [turn.continues for turn in back.turns] == [False, True, True]
    assert back.exchanges()[1] == (read[1][0][-1]["content"], "answer 1")
    assert back.feedback(0) == read[1][0][-1]["content"] and back.feedback(2) == ""


def test_the_space_of_a_conversation_is_linear_in_its_turns():
    sizes = {turns: len(encode(talk(turns)[0])) for turns in (50, 100, 200)}
    assert sizes[200] - sizes[100] < 2.5 * (sizes[100] - sizes[50])
    assert sizes[200] < 400 * 200  # the last prompt alone holds 200 messages


def test_a_template_that_drops_thoughts_changes_ids_and_they_are_kept_exactly(tmp_path):
    """The next prompt shows the last answer without its thought: the ids part there."""
    transcript = Transcript()
    hello, answer = user("hello"), {"role": "assistant", "content": "hi"}
    transcript.add([hello], "<think>x</think>hi", prompt_ids=[1, 2], response_ids=[3, 4, 5],
                   answer=answer)  # fmt: skip
    transcript.add([hello, answer, user("more")], "ok", prompt_ids=[1, 2, 5, 6], response_ids=[9])
    transcript.add([user("anew")], "ok", prompt_ids=[1, 2], response_ids=[9], feedback="good")
    one = Trajectory(policy="p", purpose="deploy", turns=transcript.turns, id="a")
    assert [(turn.continues, turn.kept_ids) for turn in one.turns] == [
        (False, 0), (True, 2), (False, 0)
    ]  # fmt: skip
    (back,) = trajectory_files.read(write(tmp_path / "a.jsonl", one))
    assert [p.prompt_ids for p in back.points()] == [(1, 2), (1, 2, 5, 6), (1, 2)]
    assert [len(p.dialogue.messages) for p in back.points()] == [1, 3, 1]
    assert back.feedback(2) == "good"


def test_an_edited_history_begins_anew():
    transcript = Transcript()
    transcript.add([user("a")], "b")
    changed = [user("a"), {"role": "assistant", "content": "edited"}, user("c")]
    transcript.add(changed, "d")
    one = Trajectory(policy="p", purpose="deploy", turns=transcript.turns, id="a")
    assert not one.turns[1].continues
    assert [list(p.dialogue.messages) for p in one.points()][1] == changed


def test_tools_and_answers_of_other_models(tmp_path):
    """No ids; tool calls and their answers, and hostile texts, come back as they were."""
    call = {"id": "1", "function": {"name": "f", "arguments": {"score": [1.5, None, "<|im_end|>"]}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    tool = {"role": "tool", "content": "</tool_call>\x00\u2028", "tool_call_id": "1", "name": "f"}
    system = {"role": "system", "content": "{experience} \\1"}
    transcript = Transcript()
    transcript.add([system, user("q")], "<tool_call>...", answer=answer)
    transcript.add([system, user("q"), answer, tool], "done")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    one = Trajectory(
        policy="gpt", purpose="extract", turns=transcript.turns, id="log 1", tools=tools
    )
    (back,) = trajectory_files.read(write(tmp_path / "a.jsonl", one))
    assert back == one and back.turns[1].continues and back.turns[1].messages == (tool,)
    points = list(back.points())
    assert points[1].dialogue.messages == (system, user("q"), answer, tool)
    assert points[1].prompt_ids is None and points[1].dialogue.tools == tuple(tools)


def test_conversations_keep_the_order_of_the_file(tmp_path):
    talks = [talk(id=name)[0] for name in ("b", "a", "c")]
    assert [t.id for t in trajectory_files.read(write(tmp_path / "a.jsonl", *talks))] == list("bac")


# --- schema 1 -------------------------------------------------------------------------------------


def test_a_file_of_schema_1_is_read_and_upgraded(tmp_path):
    """The golden file is from a run of the code before schema 2: deploy, and demonstrations."""
    lines = [json.loads(line) for line in OLD.read_text(encoding="utf-8").splitlines()]
    games = {game.key: game for game in trajectory_files.read(OLD)}
    assert len(games) == len(lines) >= 4
    assert {line["purpose"] for line in lines} == {"extract", "deploy", "demonstrate"}
    from oel_jax.data.messages import NOTHING, place_context

    for line in lines:
        keys = "game seed policy round purpose chain".split()
        game = games[tuple(line[key] for key in keys)]
        assert game.wrapper == "grid" and game.outcome == line["outcome"]
        assert (game.context is not None) == (line["purpose"] == "demonstrate")
        for old, point, turn in zip(line["turns"], game.points(), game.turns, strict=True):
            # Wrapped again it is what the policy read.
            (message,) = place_context(point.dialogue, game.context or NOTHING)
            assert message == user(old["prompt"])
            assert "Current situation" not in turn.messages[0]["content"]
            assert list(point.prompt_ids) == old["prompt_ids"]
            assert list(turn.response_ids) == old["response_ids"]
            names = ("response", "action", "observation")
            assert [getattr(turn, name) for name in names] == [old[name] for name in names]
    again = write(tmp_path / "new.jsonl", *games.values())
    assert {game.key: game for game in trajectory_files.read(again)} == games


def old_record(**changes):
    line = json.loads(OLD.read_text(encoding="utf-8").splitlines()[0])
    return line | changes


def test_an_old_prompt_in_other_words_stays_whole(tmp_path):
    turns = old_record()["turns"]
    turns[0]["prompt"] = "Another text."
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(old_record(turns=turns)) + "\n")
    (game,) = trajectory_files.read(path)
    assert game.wrapper is None
    assert [t.messages[0]["content"] for t in game.turns] == [turn["prompt"] for turn in turns]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": 1}, "unknown key 'reward'; trajectories carry no rewards"),
        ({"step": -1}, "step must be an integer"),
        ({"round": 0}, "round must be an integer"),
        ({"turns": []}, "at least one turn"),
        ({"turns": [1]}, r"turns\[0\] must be a JSON object"),
        ({"turns": [{"prompt": "x"}]}, r"turns\[0\] lacks the key 'prompt_ids'"),
    ],
)
def test_bad_lines_of_schema_1_are_refused(tmp_path, changes, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(old_record(**changes)) + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{message}"):
        trajectory_files.read(path)


# --- bad lines ------------------------------------------------------------------------------------

BAD = {
    "not JSON": (b"{nope}", "not JSON"),
    "blank line": (b"", "not JSON"),
    "not UTF-8": (json.dumps(record()).encode()[:-1] + b"\xff}", "not UTF-8"),
    "not an object": (b"[1]", "must be a JSON object"),
    "wrong schema": (record(schema="oel.trajectory/3"), "schema is 'oel.trajectory/3', .*reads"),
    "no schema": ({"game": "x"}, "schema is None"),
    "reward": (record(reward=1.0), "unknown key 'reward'; trajectories carry no rewards"),
    "reward in a turn": (turn_record(reward=0), r"turns\[0\] has the unknown key 'reward'"),
    "missing key": (record("outcome"), "lacks .*'outcome'"),
    "doubled key": (b'{"seed": 1,' + json.dumps(record()).encode()[1:], "'seed' occurs twice"),
    "NaN": (json.dumps(record(seed=float("nan"))).encode(), "NaN"),
    "float overflow": (
        json.dumps(record()).encode().replace(b'"seed": 7', b'"seed": 1e999'),
        "seed must be an integer",
    ),
    "float seed": (record(seed=7.0), "seed must be an integer"),
    "negative seed": (record(seed=-1), "seed must be an integer"),
    "boolean round": (record(round=True), "round must be an integer"),
    "round 0": (record(round=0), "round must be an integer"),
    "null round": (record(round=None), "round must be an integer"),
    "huge integer": (
        json.dumps(record()).encode().replace(b'"seed": 7', b'"seed": ' + b"9" * 5000),
        "a number is too large",
    ),
    "large integer": (record(seed=10**40), "seed must be .*more than 20 digits"),
    "string chain": (record(chain="3"), "chain must be an integer .*, got '3'"),
    "a step": (record(step=3), "unknown key 'step'"),
    "a score": (
        record(Score=3),
        "unknown key 'Score'; trajectories carry no rewards and no scores",
    ),
    "game and id": (record(id="x"), "both 'id' and 'game'"),
    "neither game nor id": (record("game"), "lacks the key 'game', .*a conversation has an 'id'"),
    "number as id": (record("game", "seed", id=1), "id must be a string"),
    "no wrapper": (record(wrapper=""), "wrapper must not be empty"),
    "context as text": (record(context="x"), "context must be a JSON object"),
    "place": (
        record(context={"kind": "raw", "text": "", "place": "left"}),
        "context.place must be one of paper, system, user, got 'left'",
    ),
    "no tools": (record(tools=[]), "tools must be a list of at least one tool"),
    "tool as text": (record(tools=["x"]), r"tools\[0\] must be a JSON object"),
    "tool with half a pair": (record(tools=[{"a": ["\ud800"]}]), r"tools\[0\].a\[0\] .*surrogate"),
    "deep tool": (record(tools=[{"a": json.loads("[" * 50 + "]" * 50)}]), "deeper than 32 levels"),
    "infinite number in a tool": (
        json.dumps(record(tools=[{"a": 7.25}])).encode().replace(b"7.25", b"1e999"),
        r"tools\[0\].a must be a finite number",
    ),
    "no messages": (turn_record(messages=[]), r"messages must be a list of at least one message"),
    "message as text": (turn_record(messages=["x"]), r"messages\[0\] must be a JSON object"),
    "role": (message_record(role="judge", content=""), r"role must be one of .*got 'judge'"),
    "unhashable role": (message_record(role=[], content=""), r"role must be one of"),
    "null content": (message_record(role="user", content=None), r"content must be a string"),
    "reward in a message": (
        message_record(role="user", content="", reward=1),
        r"unknown key 'reward'; .*no rewards",
    ),
    "tool call of a user": (
        message_record(role="user", content="", tool_calls=[{}]),
        "has tool_calls, but its role",
    ),
    "tool call without name": (
        message_record(role="assistant", content="", tool_calls=[{"function": {}}]),
        r"tool_calls\[0\] must be an object with function.name",
    ),
    "tool id of a user": (
        message_record(role="user", content="", tool_call_id="1"),
        "has a tool_call_id",
    ),
    "first turn continues": (turn_record(continues=True), "continues a turn, but it is the first"),
    "continues as number": (second_turn(continues=1), "continues must be true or false"),
    "more ids than there are": (second_turn(kept_ids=6), "kept_ids must be an integer from 0 to 5"),
    "ids kept from no turn": (turn_record(kept_ids=1), "kept_ids must be an integer from 0 to 0"),
    "half the ids": (turn_record("response_ids"), "both prompt_ids and response_ids, or neither"),
    "game without action": (turn_record("action"), "lacks the key 'action', which a game has"),
    "answer of a user": (turn_record(answer=user("x")), "answer must have the role 'assistant'"),
    "number as feedback": (turn_record(feedback=1), "feedback must be a string"),
    "purpose": (record(purpose="eval"), "purpose must be one of extract, deploy"),
    "unhashable purpose": (record(purpose=["deploy"]), "purpose must be one of"),
    "empty game": (record(game=""), "game must not be empty"),
    "number as outcome": (record(outcome=1.0), "outcome must be a string"),
    "no turns": (record(turns=[]), "at least one turn"),
    "turns as object": (record(turns={"0": {}}), "turns must be a list"),
    "turn as string": (record(turns=["x"]), r"turns\[0\] must be a JSON object"),
    "null response": (turn_record(response=None), r"turns\[0\].response must be a string"),
    "no prompt ids": (turn_record(prompt_ids=[]), r"prompt_ids must not be empty"),
    "ids as string": (turn_record(response_ids="12"), "response_ids must be a list"),
    "float id": (turn_record(prompt_ids=[1, 2.0]), r"prompt_ids\[1\] must be an integer"),
    "boolean id": (turn_record(prompt_ids=[True]), r"prompt_ids\[0\] must be an integer"),
    "id too large": (turn_record(response_ids=[0, 2**31]), r"response_ids\[1\] must be"),
    "lone surrogate": (turn_record(response="\ud800"), "half a surrogate"),
    "deep nesting": (b'{"schema":' + b"[" * 200_000, "nested far deeper|not JSON"),
    "same game again": (record(seed=1), "the game of line 1 again"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_reported_and_can_be_skipped(tmp_path, caplog, name):
    bad, message = BAD[name]
    bad = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    path = write(tmp_path / "games.jsonl", make_game(1))
    good = path.read_bytes()
    other = write(tmp_path / "other.jsonl", make_game(2)).read_bytes()
    path.write_bytes(good + bad + b"\n" + other)
    with pytest.raises(UserError, match=rf"games\.jsonl:2: .*({message}).*; ") as caught:
        trajectory_files.read(path)
    assert len(str(caught.value)) < 500
    if name != "same game again":
        with pytest.raises(UserError, match=r"games\.jsonl:2: "):
            TrajectoryWriter(path)
    assert path.read_bytes() == good + bad + b"\n" + other  # nothing already written is lost
    with caplog.at_level(logging.WARNING):
        assert [game.seed for game in trajectory_files.read(path, on_bad="skip")] == [1, 2]
    assert "games.jsonl:2: skipped" in caplog.text and "skipped 1 of 3 lines" in caplog.text


def test_useless_files(tmp_path):
    path = tmp_path / "games.jsonl"
    with pytest.raises(UserError, match="games.jsonl cannot be read: No such file"):
        trajectory_files.read(path)
    path.write_bytes(b"")
    for on_bad in ("error", "skip"):
        with pytest.raises(UserError, match="games.jsonl is empty"):
            trajectory_files.read(path, on_bad=on_bad)
    path.write_bytes(b"x\ny\n")
    with pytest.raises(UserError, match="no good line .2 skipped"):
        trajectory_files.read(path, on_bad="skip")
    with pytest.raises(UserError, match="on_bad"):
        trajectory_files.read(path, on_bad="ignore")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        trajectory_files.read(tmp_path)


# --- the writer -----------------------------------------------------------------------------------


def test_every_torn_end_is_cut_off_and_the_game_played_again(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", make_game(1), make_game(2))
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        with TrajectoryWriter(path) as writer:
            assert [game.seed for game in writer.finished] == [1]
            assert path.read_bytes() == whole[:start]
            writer.write(make_game(2))
        assert path.read_bytes() == whole
    assert "a.jsonl:2: cut off a damaged last line" in caplog.text


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"{garbage}\n", b"\xff\xfe", b'{"schema"'])
def test_other_damaged_last_lines(tmp_path, tail):
    path = write(tmp_path / "a.jsonl", make_game(1))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with pytest.raises(UserError, match=r"a\.jsonl:2: "):
        trajectory_files.read(path)
    TrajectoryWriter(path).close()
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-30])
    with TrajectoryWriter(path) as writer:
        assert writer.finished == [] and path.read_bytes() == b""


def test_a_complete_last_line_only_lacks_its_newline(tmp_path):
    path = write(tmp_path / "a.jsonl", make_game(1), make_game(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert len(trajectory_files.read(path)) == 2
    with TrajectoryWriter(path) as writer:
        assert len(writer.finished) == 2
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        json.dumps(record(schema="oel.trajectory/9")).encode() + b"\n",
        json.dumps(record(reward=1)).encode() + b"\n",
        b"a text of somebody else's",
    ],
)
def test_a_last_line_that_no_crash_explains_is_kept_and_reported(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    with pytest.raises(UserError, match=r"a\.jsonl:1: "):
        TrajectoryWriter(path)
    assert path.read_bytes() == line


def test_the_writer_refuses_what_readers_would_refuse(tmp_path):
    path = tmp_path / "a.jsonl"
    with TrajectoryWriter(path) as writer:
        writer.write(make_game(1))
        before = path.read_bytes()
        assert before.endswith(b"\n")  # on disk at once, not at close
        for bad in (
            make_game(1),
            make_game(-2),
            make_game(2, turns=[]),
            make_game(2, outcome=None),
            make_game(2, turns=[make_turn(messages=[user("\udfff")])]),
            make_game(2, turns=[make_turn(prompt_ids=[2**31])]),
        ):
            with pytest.raises(ValueError):
                writer.write(bad)
        assert path.read_bytes() == before
        writer.write(make_game(1, chain=4))  # the same board for another chain is another game
    assert len(trajectory_files.read(path)) == 2
    with pytest.raises(ValueError, match="holds the game"), TrajectoryWriter(path) as writer:
        writer.write(make_game(1))


def test_unwritable_places_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="cannot be written: No such file"):
        TrajectoryWriter(tmp_path / "missing" / "a.jsonl")
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        TrajectoryWriter(tmp_path)
    with pytest.raises(ValueError, match="sync_every"):
        TrajectoryWriter(tmp_path / "a.jsonl", sync_every=0)


def run_python(code, *arguments):
    begin = "import sys; sys.path.append('tests')\nfrom tests.data.test_trajectories import *\n"
    program = begin + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip


def test_a_killed_process_loses_no_finished_game(tmp_path):
    path = tmp_path / "a.jsonl"
    done = run_python(
        """
        writer = TrajectoryWriter(sys.argv[1], sync_every=1000)
        for seed in range(50):
            writer.write(make_game(seed))
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
    )
    assert done.returncode == -signal.SIGKILL
    assert [game.seed for game in trajectory_files.read(path)] == list(range(50))


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """A file size limit acts as the full disk: the failing write is a partial one."""
    path = write(tmp_path / "a.jsonl", make_game(0))
    line = os.path.getsize(path)
    done = run_python(
        """
        import resource
        limit = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with TrajectoryWriter(sys.argv[1]) as writer:
            for seed in range(1, 9):
                try:
                    writer.write(make_game(seed))
                except UserError as error:
                    sys.exit(f"{seed}: {error}")
        """,
        path,
        line * 3 + line // 2,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"3: cannot write to {path}: File too large; make room")
    assert os.path.getsize(path) == line * 3
    assert [game.seed for game in trajectory_files.read(path)] == [0, 1, 2]


# --- the store ------------------------------------------------------------------------------------


def fill(store, purpose, *sizes):
    seeds = iter(range(1000))
    for number, size in enumerate(sizes):
        write(store.path(purpose, number), *[make_game(next(seeds)) for _ in range(size)])


@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4), (1, 5, 2, 4), (12, 3)])
def test_a_range_of_a_store_does_not_depend_on_its_files(tmp_path, sizes):
    store = TrajectoryStore(tmp_path)
    fill(store, "deploy", *sizes)
    fill(store, "extract", 2)
    for start, stop in ((0, 4), (4, 8), (8, 12), (3, 9), (11, 12), (5, 5)):
        found = store.read("deploy", start, stop)
        assert [stored.trajectory.seed for stored in found] == list(range(start, stop))
        assert all(s.trajectory in trajectory_files.read(s.path) for s in found)


def test_a_store_orders_its_files_by_number(tmp_path):
    store = TrajectoryStore(tmp_path)
    for number in (10_000, 2, 10):
        write(store.path("deploy", number), make_game(number))
    write(store.path("deploy", 0).with_suffix(".process_001.jsonl"), make_game(5))
    assert [s.trajectory.seed for s in store.read("deploy", 0, 3)] == [2, 10, 10_000]
    with pytest.raises(ValueError, match="purpose must be one of"):
        store.path("../x", 0)


def test_what_a_store_lacks_is_said(tmp_path):
    store = TrajectoryStore(tmp_path)
    with pytest.raises(UserError, match="holds 0 trajectories for 'deploy', and numbers 1 to 4"):
        store.read("deploy", 0, 4)
    fill(TrajectoryStore(tmp_path), "deploy", 3)
    with pytest.raises(UserError, match="holds 3 trajectories .* numbers 3 to 4 .* deploy stage"):
        TrajectoryStore(tmp_path).read("deploy", 2, 4)
    store.path("deploy", 1).write_bytes(b"")
    with pytest.raises(UserError, match="deploy_0001.jsonl is empty"):
        TrajectoryStore(tmp_path).read("deploy", 0, 1)
