"""Contexts of single answers: hindsight and coach, for games and for conversations."""

import importlib
import json

import numpy as np
import pytest
from tiny_run import contents, copy_of, opened, tiny_config

from oel_jax.base import preemption
from oel_jax.base.errors import UserError
from oel_jax.chat.render import render
from oel_jax.chat.tokenizer import load_tokenizer
from oel_jax.data.hindsight import HEAD, hindsight, later_parts
from oel_jax.data.messages import PLACES, Context, Dialogue, answer_message, user
from oel_jax.data.trajectories import Trajectory, Transcript, decision_points
from oel_jax.data.trajectory_files import Stored, TrajectoryStore, TrajectoryWriter, read
from oel_jax.learner.coach import written_texts
from oel_jax.learner.extract import extract
from oel_jax.learner.turn_contexts import count_contexts, points_to_learn
from oel_jax.models import bundled
from oel_jax.runs.metrics import read_metrics

consolidation = importlib.import_module("oel_jax.learner.consolidate")
coaching = importlib.import_module("oel_jax.learner.coach")

LATER = ("extract", "consolidate", "evaluate")
SIZES = dict(
    extract__max_prompt=900, extract__l_max=160, sampler__max_len=0, evaluate__in_context=False
)

# The nano model thinks for longer than that; what it thought serves as a text here.
SHORT = dict(extract__l_max=48, extract__unfinished_thought="keep")


def config_of(**changes):
    return tiny_config(**(SIZES | {"consolidate__steps": 1} | changes))


def conversation(tokenizer, number):
    """Two answers of ours; after the last one nothing came, but in every second conversation."""
    transcript, messages = Transcript(), []
    for turn in range(2):
        messages = [*messages, user(f"go left {number} or right {turn}, please")]
        ids = render(tokenizer, Dialogue(tuple(messages)), thinking=True)
        said = tokenizer.encode(f"answer{number}", first=False)
        last = turn == 1 and number % 2
        transcript.add(
            messages,
            tokenizer.decode(said),
            prompt_ids=ids,
            response_ids=[*said, tokenizer.stop_ids[0]],
            feedback="too long, go up" if last else None,
        )
        messages = [*messages, answer_message(tokenizer.decode(said))]
    return Trajectory(policy="round_000", purpose="deploy", turns=transcript.turns, id=f"c{number}")


@pytest.fixture
def chats(finished_run, tmp_path):
    """A copy of the finished run whose deployed games are conversations."""
    work = copy_of(finished_run, tmp_path / "chats", *LATER)
    tokenizer, place = load_tokenizer(bundled.MODEL_DIR), work / "round_001" / "trajectories"
    (place / "deploy_0002.jsonl").unlink()
    for file in range(2):
        path = place / f"deploy_{file:04d}.jsonl"
        path.unlink()
        with TrajectoryWriter(path) as writer:
            for number in range(4):
                writer.write(conversation(tokenizer, 4 * file + number))
    return work


@pytest.fixture
def games(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "games", *LATER)
    for file in (1, 2):  # one optimizer step is enough
        (work / "round_001" / "trajectories" / f"deploy_{file:04d}.jsonl").unlink()
    return work


@pytest.fixture
def made(monkeypatch):
    """(samples, teacher) of every optimizer step."""
    found, roll = [], consolidation.student_samples

    def recording(*arguments):
        samples, stopped = roll(*arguments)
        found.append((samples, arguments[4]))
        return samples, stopped

    monkeypatch.setattr(consolidation, "student_samples", recording)
    return found


def learned(work, config):
    """Extract and consolidate without the other stages; the metrics of the only step."""
    with opened(work, config, change=True) as run:
        files = extract(run, 1)
        assert all(file.is_file() for file in files)
        consolidation.consolidate(run, 1)
    rows = read_metrics(work / "metrics.jsonl")
    (step,) = [row["values"] for row in rows if row["stage"] == "consolidate"]
    assert np.isfinite(step["loss"]) and step["kl"] > 1e-4
    return step


def read_prompts(made):
    """What the teacher read before each answer of the first step, as text."""
    (samples, teacher), *_ = made
    prompts = []
    for sample in samples:
        cached = teacher.prefix(sample.knowledge).ids[: sample.shared]
        prompts.append([*cached, *sample.suffix])
    return prompts, samples, teacher


@pytest.mark.parametrize("place", PLACES)
def test_each_answer_of_a_game_is_read_with_what_came_after_it(games, made, place):
    config = config_of(extract__experience="hindsight", extract__place=place)
    learned(games, config)
    prompts, samples, teacher = read_prompts(made)
    tokenizer = teacher.model.tokenizer
    played = read(games / "round_001" / "trajectories" / "deploy_0000.jsonl")
    points = decision_points(played)
    assert len(prompts) == len(points)  # an outcome follows every answer
    for point, prompt in zip(points, prompts, strict=True):
        parts = later_parts(played[point.episode], point.turn)
        text = hindsight(parts, 160, lambda piece: len(tokenizer.encode(piece)))
        assert text.startswith(HEAD.strip()) and len(tokenizer.encode(text)) <= 160
        context = Context("hindsight", text, place)
        assert prompt == render(tokenizer, point.dialogue, context, thinking=True)
    assert len({tuple(prompt) for prompt in prompts}) > 1
    assert min(sample.shared for sample in samples) > 0  # the beginning of the prompts is shared
    assert max(sample.shared for sample in samples) <= len(teacher.prefix(0).ids)


@pytest.mark.parametrize("place", ["system", "user"])
def test_an_answer_of_a_conversation_that_nothing_follows_is_left_out(chats, made, place, capsys):
    config = config_of(extract__experience="hindsight", extract__place=place)
    learned(chats, config)
    prompts, _, teacher = read_prompts(made)
    tokenizer = teacher.model.tokenizer
    talks = read(chats / "round_001" / "trajectories" / "deploy_0000.jsonl")
    expected = []
    for point in decision_points(talks):
        parts = later_parts(talks[point.episode], point.turn)
        if parts:
            text = hindsight(parts, 160, lambda piece: len(tokenizer.encode(piece)))
            context = Context("hindsight", text, place)
            expected.append(render(tokenizer, point.dialogue, context, thinking=True))
    assert len(expected) == 6 and prompts == expected
    assert "12 of 16 deployed answers have a context of their own (hindsight)" in (
        capsys.readouterr().out
    )


def test_the_paper_s_place_needs_the_paper_s_wrapper(chats):
    config = config_of(extract__experience="hindsight")
    with opened(chats, config, change=True) as run:
        extract(run, 1)
        with pytest.raises(UserError, match="place 'paper' needs prompts in one of the paper's"):
            consolidation.consolidate(run, 1)


def test_conversations_without_anything_after_an_answer_teach_nothing(chats):
    tokenizer, store = load_tokenizer(bundled.MODEL_DIR), chats / "round_001" / "trajectories"
    for path in store.glob("deploy_*.jsonl"):
        talks = read(path)
        path.unlink()
        with TrajectoryWriter(path) as writer:
            for talk in talks:
                transcript = Transcript()
                point = next(talk.points())
                transcript.add(
                    point.dialogue.messages,
                    talk.turns[0].response,
                    prompt_ids=point.prompt_ids,
                    response_ids=talk.turns[0].response_ids,
                )
                one = Trajectory(
                    policy="round_000", purpose="deploy", turns=transcript.turns, id=talk.id
                )
                writer.write(one)
    config = config_of(extract__experience="hindsight", extract__place="system")
    with opened(chats, config, change=True) as run:
        with pytest.raises(UserError, match="none of the 8 deployed answers has a context"):
            extract(run, 1)
        episodes = [Stored(path, talk) for path in store.glob("deploy_*") for talk in read(path)]
        assert points_to_learn(config, run.workdir, 1, episodes, tokenizer) == ([], [])


class Stop(BaseException):
    pass


@pytest.mark.parametrize("kind", [pytest.param("games", marks=pytest.mark.slow), "chats"])
def test_a_coach_writes_for_every_answer_and_resumes_after_a_kill(
    kind, request, made, monkeypatch, capsys
):
    work = request.getfixturevalue(kind)
    config = config_of(extract__experience="coach", extract__place="user", **SHORT)
    whole, cut = work, work.parent / "cut"
    copy_of(work, cut)
    step = learned(whole, config)
    store = TrajectoryStore(whole / "round_001" / "trajectories")
    files = sorted((whole / "round_001" / "knowledge").glob("coach_*.jsonl"))
    assert [file.name for file in files] == [f"coach_{p.name}" for p in store.files("deploy")]
    written = {}
    for source, file in zip(store.files("deploy"), files, strict=True):
        talks = read(source)
        records = [json.loads(line) for line in file.read_bytes().splitlines()]
        order = [(tuple(r["trajectory"]), r["turn"]) for r in records]
        # One line an answer, in the order of the answers.
        assert order == [(t.key, n) for t in talks for n in range(len(t.turns))]
        written |= written_texts(file)
        assert written_texts(file) == dict(zip(order, (r["text"] for r in records), strict=True))
    assert any(written.values())
    # What the teacher read is what was written for that very answer.
    prompts, samples, teacher = read_prompts(made)
    talks, tokenizer = read(store.path("deploy", 0)), teacher.model.tokenizer
    expected = []
    for point in decision_points(talks):
        text = written[talks[point.episode].key, point.turn]
        if text:
            assert len(tokenizer.encode(text)) <= 48
            context = Context("coach", text, "user")
            expected.append(render(tokenizer, point.dialogue, context, thinking=True))
    assert prompts == expected and step["prefixes"] == len(samples)
    rows = [r["values"] for r in read_metrics(whole / "metrics.jsonl") if r["stage"] == "coach"]
    assert [row["texts"] for row in rows] == [len(written)]
    assert f"the coach wrote {len(written)} text(s)" in capsys.readouterr().out

    # Killed in the middle of a file, its last line torn; the same command ends in the same bytes.
    record, calls = coaching._record, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) > 5:
            raise Stop
        return record(*arguments)

    with opened(cut, config, change=True) as run, monkeypatch.context() as patched:
        patched.setattr(coaching, "_record", killed)
        with pytest.raises(Stop):
            extract(run, 1)
    first = cut / "round_001" / "knowledge" / "coach_deploy_0000.jsonl"
    assert len(first.read_bytes().splitlines()) == 5
    first.write_bytes(first.read_bytes() + b'{"trajectory": ["c')
    asked = []
    with opened(cut, config) as run, monkeypatch.context() as patched:
        patched.setattr(coaching, "_record", lambda *a: asked.append(a) or record(*a))
        extract(run, 1)
    assert len(asked) == len(written) - 5
    pattern = "round_001/knowledge/**/*"
    assert contents(cut, pattern) == contents(whole, pattern)


def test_a_notice_keeps_the_finished_texts(games, monkeypatch):
    config = config_of(extract__experience="coach", extract__place="user", **SHORT)
    record = coaching._record

    def noticed(*arguments):
        monkeypatch.setattr(preemption, "noticed", lambda: True)
        return record(*arguments)

    monkeypatch.setattr(coaching, "_record", noticed)
    with (
        opened(games, config, change=True) as run,
        pytest.raises(preemption.Preempted, match="finished texts are kept"),
    ):
        extract(run, 1)
    kept = (games / "round_001" / "knowledge" / "coach_deploy_0000.jsonl").read_bytes()
    assert kept.endswith(b"\n") and kept.count(b"\n") >= 1


def test_texts_of_a_coach_that_are_not_there(games):
    config = config_of(extract__experience="coach")
    path = games / "round_001" / "trajectories" / "deploy_0000.jsonl"
    episodes = [Stored(path, game) for game in read(path)]
    tokenizer = load_tokenizer(bundled.MODEL_DIR)
    with opened(games, config, change=True) as run:
        file = run.workdir.coach(1, path)
        with pytest.raises(UserError, match="cannot be read.*run the extract stage again"):
            count_contexts(config, run.workdir, 1, episodes, tokenizer)
        file.parent.mkdir()
        file.write_text(json.dumps({"trajectory": ["x"], "turn": 0, "text": "t"}) + "\n")
        with pytest.raises(UserError, match="has no text for answer 1 of"):
            count_contexts(config, run.workdir, 1, episodes, tokenizer)
        for bad in (b"[]\n", b'{"trajectory": ["x"], "turn": 0}\n', b"{\n"):
            file.write_bytes(bad)
            with pytest.raises(UserError, match=rf"{file.name}:1: .*run the extract stage again"):
                count_contexts(config, run.workdir, 1, episodes, tokenizer)
