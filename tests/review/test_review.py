"""A round that waits for a person: the gate, the command, and what is learned then."""

import importlib
import os
import subprocess
import sys

import pytest
from tiny_run import as_flags, contents, copy_of, go, tiny_config

from oel_jax.base.errors import NeedsReview, UserError
from oel_jax.base.files import read_json
from oel_jax.review.command import main, review
from oel_jax.runs.workdir import Workdir, lock_directory

LATER = ("extract", "consolidate", "evaluate")
BETTER = "- EXPERIENCE ITEM: G wins.\n"


def config_of(**changes):
    return tiny_config(**({"extract__review": True, "consolidate__steps": 1} | changes))


@pytest.fixture
def waiting(finished_run, tmp_path, capsys):
    """A run whose round has extracted its texts and waits."""
    work = copy_of(finished_run, tmp_path / "run", *LATER)
    with pytest.raises(NeedsReview, match=r"round 1: text\(s\) 0, 1 are not decided on.*--approve"):
        go(work, config_of(), change=True)
    capsys.readouterr()
    return work


def state(work):
    return [one["status"] for one in read_json(work / "round_001/knowledge/review.json")["texts"]]


def test_a_run_waits_and_resumes_with_the_approved_texts_alone(waiting, tmp_path, capsys):
    workdir = Workdir(waiting)
    original = workdir.knowledge(1).read_bytes()
    page = workdir.review_page(1).read_text()
    texts = read_json(workdir.knowledge(1))["texts"]
    for chain, text in enumerate(texts):
        assert f"## Text {chain}: waiting" in page
        assert all(f"    {line}" in page for line in text.split("\n"))
    assert page.count("frozen_lake, seed") == 4 and "    - begins: " in page
    assert not (waiting / "round_001/policy").exists()
    with pytest.raises(NeedsReview):  # the same command waits again
        go(waiting, config_of())

    better = tmp_path / "better.txt"
    better.write_text(BETTER)
    shown = review(waiting, approve=["1"], reject=["0"], texts=[f"1:{better}"])
    assert "## Text 0: rejected" in shown and "As edited:" in shown and "G wins" in shown
    assert workdir.review_page(1).read_text() == shown
    go(waiting, config_of())
    out = capsys.readouterr().out
    assert "1 of 2 text(s) approved, 1 of them edited" in out
    approved = read_json(workdir.approved(1))
    assert approved["texts"] == [BETTER.strip()] and approved["chains"] == [1]
    assert workdir.knowledge(1).read_bytes() == original
    recorded = [file["path"] for file in workdir.entry(1, "review")["files"]]
    assert "round_001/knowledge/approved.json" in recorded
    workdir.verify(1, "review")
    # What the teacher and the evaluation in context read is the edited text.
    samples = read_json(waiting / "round_001/evaluate/in_context.samples.json")["games"]
    assert {game["knowledge"] for game in samples} == {BETTER.strip()}
    assert (waiting / "round_001/policy/model.safetensors").exists()
    with pytest.raises(UserError, match="the review of round 1 is closed"):
        review(waiting, approve=["0"])


def test_approving_everything_learns_what_a_run_without_a_review_learns(waiting, tmp_path):
    review(waiting, approve=["all"])
    go(waiting, config_of(), ["review", "consolidate"])
    plain = copy_of(waiting, tmp_path / "plain", "review", "consolidate")
    go(plain, tiny_config(consolidate__steps=1), ["consolidate"], change=True)
    pattern = "round_001/policy/*"
    assert contents(plain, pattern) == contents(waiting, pattern) != {}


def test_texts_that_were_changed_after_they_were_approved_are_refused(waiting):
    review(waiting, approve=["all"])
    go(waiting, config_of(), ["review"])
    file = Workdir(waiting).approved(1)
    content = file.read_text()
    file.write_text(content.replace("H", "G", 1) if "H" in content else content.replace("a", "b"))
    with pytest.raises(UserError, match="has changed since its texts were approved"):
        go(waiting, config_of(), ["consolidate"])


def test_decisions_one_by_one_and_in_what_order(waiting, tmp_path, monkeypatch):
    assert state(waiting) == ["waiting", "waiting"]
    review(waiting, approve=["0"])
    review(waiting, reject=["all"])
    assert state(waiting) == ["approved", "rejected"]
    review(waiting, approve=["1"], reject=["0"])
    assert state(waiting) == ["rejected", "approved"]
    # What was approved and is edited then waits again, unless the same command approves it.
    editor = tmp_path / "editor.py"
    editor.write_text("import sys; open(sys.argv[1], 'a').write('- EXPERIENCE ITEM: more\\n')")
    monkeypatch.setenv("VISUAL", f"{sys.executable} {editor}")
    review(waiting, edit=["1"])
    assert state(waiting) == ["rejected", "waiting"]
    review(waiting, edit=["1"], approve=["all"])
    assert state(waiting) == ["rejected", "approved"]
    kept = read_json(waiting / "round_001/knowledge/review.json")["texts"][1]["edited"]
    assert kept.count("EXPERIENCE ITEM: more") == 2
    monkeypatch.setenv("VISUAL", "true")  # changes nothing
    review(waiting, edit=["1"])
    assert state(waiting) == ["rejected", "approved"]
    # A run that was extracted anew is decided on anew.
    file = Workdir(waiting).knowledge(1)
    before = read_json(file)["texts"]
    file.write_text(file.read_text().replace("EXPERIENCE", "experience"))
    changed = [now != old for now, old in zip(read_json(file)["texts"], before, strict=True)]
    page = review(waiting)
    for chain, (new, old) in enumerate(zip(changed, ("rejected", "approved"), strict=True)):
        assert f"## Text {chain}: {'waiting' if new else old}" in page
    assert any(changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(approve=["2"]), "'2' is no text of this round; there are 0 to 1"),
        (dict(approve=["-1"]), "'-1' is no text"),
        (dict(reject=["first"]), "'first' is no text"),
        (dict(approve=["0"], reject=["0"]), "text 0 cannot be both"),
        (dict(approve=["all"], reject=["all"]), "cannot all be both"),
        (dict(texts=["0"]), "give NUMBER:FILE"),
        (dict(texts=["0:nowhere.txt"]), "nowhere.txt cannot be read"),
        (dict(texts=["9:x"]), "'9' is no text"),
        (dict(edit=["0"]), r"set \$EDITOR"),
        (dict(round_number=2), "--round=2: its texts are not extracted"),
    ],
)
def test_what_cannot_be_decided(waiting, monkeypatch, arguments, message):
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.delenv("EDITOR", raising=False)
    before = (waiting / "round_001/knowledge/review.json").read_bytes()
    with pytest.raises(UserError, match=message):
        review(waiting, **arguments)
    assert (waiting / "round_001/knowledge/review.json").read_bytes() == before


def test_bad_files_and_editors(waiting, tmp_path, monkeypatch):
    empty, other = tmp_path / "empty", tmp_path / "latin"
    empty.write_text(" \n")
    other.write_bytes(b"\xff")
    for given, message in ((empty, "the text is empty"), (other, "is not UTF-8")):
        with pytest.raises(UserError, match=message):
            review(waiting, texts=[f"0:{given}"])
    for editor, message in (("false", "ended with status 1"), ("no-such-editor", "be started")):
        monkeypatch.setenv("VISUAL", editor)
        with pytest.raises(UserError, match=message):
            review(waiting, edit=["0"])
    (waiting / "round_001/knowledge/review.json").write_text('{"schema": "other"}')
    with pytest.raises(UserError, match="no review of this version"):
        review(waiting)


def test_texts_that_cannot_be_learned(waiting, tmp_path):
    review(waiting, reject=["all"])
    with pytest.raises(UserError, match="all texts are rejected") as error:
        go(waiting, config_of())
    assert error.value.status == 2
    long = tmp_path / "long"
    long.write_text("- EXPERIENCE ITEM: " + "very " * 100)
    review(waiting, texts=[f"0:{long}"], approve=["0"])
    with pytest.raises(UserError, match=r"text 0 was edited and has \d+ tokens, more than config"):
        go(waiting, config_of())


def test_a_run_that_is_going_on_or_that_waits_for_nobody(waiting, finished_run, tmp_path):
    lock = lock_directory(waiting)
    try:
        assert "## Text 0: waiting" in review(waiting)  # reading takes no lock
        with pytest.raises(UserError, match="is in use by process"):
            review(waiting, approve=["all"])
    finally:
        os.close(lock)
    with pytest.raises(UserError, match="does not wait for a review"):
        review(copy_of(finished_run, tmp_path / "plain"), approve=["all"])
    with pytest.raises(UserError, match="there is no run"):
        review(tmp_path / "nowhere")


def test_a_kill_between_approval_and_training_changes_nothing(waiting, monkeypatch):
    review(waiting, approve=["all"])
    gate = importlib.import_module("oel_jax.review.gate")

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(gate, "digest_of", killed)
        with pytest.raises(Killed):
            go(waiting, config_of(), ["review"])
    assert not Workdir(waiting).approved(1).exists()
    go(waiting, config_of(), ["review"])
    assert len(read_json(Workdir(waiting).approved(1))["texts"]) == 2


@pytest.mark.slow
def test_the_command_and_the_status_76(finished_run, tmp_path, capsys):
    work = copy_of(finished_run, tmp_path / "run", *LATER)
    flags = as_flags(extract__review=True, consolidate__steps=1)
    flags += [f"--workdir={work}", "--allow_config_change"]
    done = subprocess.run(
        [sys.executable, "-m", "oel_jax.main", *flags],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 76, done.stderr
    assert "waiting for review: round 1: text(s) 0, 1" in done.stderr
    assert main([f"--workdir={work}"]) == 0
    assert "## Text 1: waiting" in capsys.readouterr().out
    assert main([f"--workdir={work}", "--approve", "0", "1"]) == 0
    assert "## Text 1: approved" in capsys.readouterr().out
    assert main([f"--workdir={work}", "--approve", "7"]) == 2
    assert capsys.readouterr().err.startswith("error: '7' is no text")


@pytest.mark.parametrize(
    "changes",
    [
        {"extract__experience": "hindsight", "evaluate__in_context": False},
        {"extract__experience": "none"},
        {"evaluate__curve": (1,)},
    ],
)
def test_what_a_review_does_not_go_with(changes):
    from oel_jax.config.checks import validate

    with pytest.raises(UserError, match=r"extract\.review"):
        validate(config_of(**changes))


def test_a_study_waits_for_nobody(tmp_path):
    from oel_jax.study.definitions import Study, Variant, runs

    study = Study(tiny_config(), (Variant("a", {"extract.review": True}),), (1,), ())
    with pytest.raises(UserError, match=r"variant a: config\.extract\.review is True.*in a study"):
        runs(study, tmp_path)
