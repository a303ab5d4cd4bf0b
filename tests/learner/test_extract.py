"""Chains of knowledge: lock-step, batching, thoughts, modes, and bad trajectory files."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import contents, copy_of, opened, tiny_config

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.chat.tokenizer import load_tokenizer
from oel_jax.data import answers, knowledge
from oel_jax.data.prompts import extraction_history
from oel_jax.data.trajectory_files import read
from oel_jax.learner.contexts import check_other_run
from oel_jax.learner.extract import extract
from oel_jax.runs.metrics import read_metrics
from oel_jax.sampler.sampler import Sampler

LATER = ("extract", "consolidate", "evaluate")


def texts(workdir):
    return contents(workdir, "round_001/knowledge/**/*")


def extracted(finished_run, workdir, **changes):
    """Extraction alone, from the games of the finished run, with a changed config."""
    if not workdir.exists():
        copy_of(finished_run, workdir, *LATER)
    with opened(workdir, tiny_config(**changes), change=True) as run:
        extract(run, 1)
    return texts(workdir)


@pytest.fixture
def asked(monkeypatch):
    """Prompts of all extractor calls, as token ids."""
    prompts = []
    generate = Sampler.generate

    def recording(self, params, requests, *rest):
        prompts.extend(request.prompt for request in requests)
        return generate(self, params, requests, *rest)

    monkeypatch.setattr(Sampler, "generate", recording)
    return prompts


def test_a_step_appends_what_was_parsed(finished_run):
    config = tiny_config()
    count = load_tokenizer(config.model.path).encode
    place = finished_run / "round_001" / "knowledge"
    for chain in range(2):
        text = ""
        for step in (1, 2):
            record = read_json(place / f"chain_{chain:02d}" / f"step_{step:03d}.json")
            answer, finished = answers.split_thought(record["response"], "drop", opened=False)
            assert record["thought_finished"] == finished
            assert record["parsed"] == knowledge.parse(answer or "", "v4")
            text = knowledge.append(text, record["parsed"])
            assert record["text"] == text
            assert record["knowledge_tokens"] == len(count(text))
        assert read_json(place / "knowledge.json")["texts"][chain] == text
    assert any(read_json(place / "knowledge.json")["texts"])  # otherwise this shows nothing


def test_chains_in_lock_step_equal_chains_one_after_the_other(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", *LATER)
    alone = extracted(finished_run, work, extract__chains=1)
    everything = texts(finished_run)
    name = "round_001/knowledge/chain_00/step_002.json"
    assert alone[name] == everything[name]
    # Chain 0 is done; now chain 1 goes through its steps alone.
    assert extracted(finished_run, work) == everything


def test_independent_calls_may_be_made_at_once(finished_run, tmp_path):
    at_once = extracted(finished_run, tmp_path / "a", extract__previous=False)
    one_by_one = extracted(
        finished_run, tmp_path / "b", extract__previous=False, sampler__slots=2,
        sampler__prefill_rows=2,
    )  # fmt: skip
    assert at_once == one_by_one
    # Step 1 has no previous knowledge either way.
    first = "round_001/knowledge/chain_01/step_001.json"
    assert at_once[first] == texts(finished_run)[first]


def test_previous_knowledge_is_shown_only_if_asked_for(finished_run, tmp_path, asked):
    extracted(finished_run, tmp_path / "a")
    # Two slots: one step after the other, so that there is knowledge which could be shown.
    slots = dict(sampler__slots=2, sampler__prefill_rows=2)
    extracted(finished_run, tmp_path / "b", extract__previous=False, **slots)
    decode = load_tokenizer(tiny_config().model.path).decode
    shown = [decode(ids) for ids in asked]
    item = read_json(tmp_path / "a/round_001/knowledge/chain_00/step_001.json")["text"]
    assert len(shown) == 8 and item
    # Step 1 of both chains, then step 2; twice.
    counts = [text.count(item) for text in shown]
    assert counts[2] == 1 and counts[0] == counts[1] == 0 and counts[4:] == [0] * 4


@pytest.mark.parametrize("mode", ["full", "text_only", "none"])
def test_how_a_game_ended_is_shown_as_configured(finished_run, tmp_path, monkeypatch, mode):
    from oel_jax.data import prompts

    histories = []
    original = prompts.extraction_prompt

    def recording(history, *args, **kwargs):
        histories.append(history)
        return original(history, *args, **kwargs)

    monkeypatch.setattr(prompts, "extraction_prompt", recording)
    extracted(finished_run, tmp_path / "run", extract__outcome=mode)
    games = contents(finished_run, "round_001/trajectories/extract_*").values()
    outcomes = [json.loads(line)["outcome"] for file in games for line in file.splitlines()]
    result = sum("Final Result" in outcome for outcome in outcomes)
    assert len(histories) == len(outcomes) == 4 and result
    assert sum("Final Result" in h for h in histories) == (result if mode == "full" else 0)
    ends = {"Feedback:": outcomes, "round limit": outcomes}
    for words, all_of_them in ends.items():
        expected = 0 if mode == "none" else sum(words in outcome for outcome in all_of_them)
        assert sum(words in h for h in histories) == expected


def test_thought_markers_of_the_player_are_text_or_tokens(finished_run, tmp_path, asked):
    extracted(finished_run, tmp_path / "a", extract__previous=False)
    tokens = dict(extract__previous=False, extract__history_markers="tokens")
    extracted(finished_run, tmp_path / "b", **tokens)
    tokenizer = load_tokenizer(tiny_config().model.path)
    markers = {i for i, token in tokenizer.control.items() if "think>" in token.text}
    as_text, as_tokens = asked[:4], asked[4:]
    written = sum(
        (i in markers)
        for chain in range(2)
        for game in read(finished_run / "round_001" / "trajectories" / f"extract_{chain:04d}.jsonl")
        for turn in game.turns
        for i in turn.response_ids
    )
    assert written and sum(i in markers for ids in as_tokens for i in ids) == written
    assert not any(i in markers for ids in as_text for i in ids)
    assert [tokenizer.decode(ids) for ids in as_tokens] == [tokenizer.decode(i) for i in as_text]


def test_unfinished_thoughts_are_dropped_or_kept_and_counted(finished_run, tmp_path, capsys):
    budget = dict(extract__l_max=4, extract__version="v3")  # no thought ends in 4 tokens
    dropped = extracted(finished_run, tmp_path / "a", **budget)
    said = capsys.readouterr().out
    assert "4 of 4 extractor calls did not finish their thought" in said and "dropped" in said
    assert "2 of 2 knowledge texts are empty" in said
    kept = extracted(finished_run, tmp_path / "b", **budget, extract__unfinished_thought="keep")
    assert "kept as knowledge" in capsys.readouterr().out
    for name in dropped:
        if "step" not in name:
            continue
        one, other = json.loads(dropped[name]), json.loads(kept[name])
        assert not one["thought_finished"] and not one["stopped"] and one["text"] == ""
        assert other["parsed"] == other["response"].strip() != ""
    rows = read_metrics(tmp_path / "a" / "metrics.jsonl")
    shares = [r["values"]["unfinished_thoughts"] for r in rows if r["stage"] == "extract"]
    assert shares == [1.0, 1.0]


def test_shared_trajectories_serve_all_chains(finished_run, tmp_path, asked):
    work = copy_of(finished_run, tmp_path / "run", *LATER)
    (work / "round_001" / "trajectories" / "extract_0001.jsonl").unlink()
    extracted(finished_run, work, extract__trajectories="shared", extract__previous=False)
    assert len(asked) == 4 and asked[:2] == asked[2:] and asked[0] != asked[1]
    found = texts(work)
    name = "round_001/knowledge/chain_00/step_001.json"
    assert found[name] == texts(finished_run)[name]


def test_another_model_can_extract(finished_run, tmp_path):
    mate = tmp_path / "mate"
    shutil.copytree(tiny_config().model.path, mate)
    weights = load_file(mate / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32(0.1)
    save_file(weights, mate / "model.safetensors", metadata={"format": "pt"})
    other = extracted(finished_run, tmp_path / "run", extract__model_path=str(mate))
    answers = [json.loads(other[n])["response"] for n in other if "step" in n]
    before = texts(finished_run)
    assert answers != [json.loads(before[n])["response"] for n in other if "step" in n]
    with pytest.raises(UserError, match="no model directory .*nowhere"):
        extracted(finished_run, tmp_path / "run", extract__model_path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b'{"schema": "oel.trajectory/1", "ga', "1: not JSON"),
        (b'{"schema": "oel.trajectory/0"}\n', "1: schema is 'oel.trajectory/0'"),
    ],
)
def test_a_bad_trajectory_file_is_named(finished_run, tmp_path, content, message):
    work = copy_of(finished_run, tmp_path / "run", *LATER)
    path = work / "round_001" / "trajectories" / "extract_0001.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        extracted(finished_run, work)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert not texts(work)


# --- upkeep of knowledge --------------------------------------------------------------------------

SAYINGS = ["H is deadly.", "h  is deadly", "G wins the game.", "NO NEW EXPERIENCE"]


@pytest.fixture
def said(monkeypatch):
    """Calls take turns with these answers, whatever the model generates."""
    turn, generate = itertools.count(), Sampler.generate
    tokenizer = load_tokenizer(tiny_config().model.path)

    def speaking(self, params, requests, *rest):
        for answer in generate(self, params, requests, *rest):
            words = f"</think>- EXPERIENCE ITEM: {SAYINGS[next(turn) % len(SAYINGS)]}"
            ids = tuple(tokenizer.encode(words))
            yield replace(answer, ids=ids, stopped=False, log_probs=None)

    monkeypatch.setattr(Sampler, "generate", speaking)


def steps_of(work):
    """[chain][step] -> the saved record."""
    place = work / "round_001" / "knowledge"
    return [
        [read_json(place / f"chain_{chain:02d}" / f"step_{step:03d}.json") for step in (1, 2)]
        for chain in range(2)
    ]


def test_known_items_and_empty_answers_are_not_appended(finished_run, tmp_path, said, capsys):
    """Chain 0 says the first and the third, chain 1 the second and the last."""
    work = tmp_path / "run"
    extracted(finished_run, work, extract__no_op=True, extract__max_prompt=384)
    first, second = steps_of(work)
    assert [record["no_new"] for record in first] == [False, False]
    assert [record["no_new"] for record in second] == [False, True]
    assert second[1]["text"] == second[0]["text"] and second[1]["parsed"] == ""
    assert "duplicates" not in second[1]
    rows = [r["values"] for r in read_metrics(work / "metrics.jsonl") if r["stage"] == "extract"]
    assert [row["no_new"] for row in rows] == [0.0, 0.5]
    assert [row["nothing_parsed"] for row in rows] == [0.0, 0.0]
    assert "1 answer(s) with nothing new (config.extract.no_op) in 4" in capsys.readouterr().out


def test_duplicates_are_counted(finished_run, tmp_path, said, monkeypatch, capsys):
    monkeypatch.setitem(globals(), "SAYINGS", [SAYINGS[0], SAYINGS[2], SAYINGS[1]])
    work = tmp_path / "run"
    extracted(finished_run, work, extract__deduplicate=True)
    first, second = steps_of(work)  # chain 0: H, then H again; chain 1: G, then H
    assert [record["duplicates"] for record in first] == [0, 1]
    assert [record["duplicates"] for record in second] == [0, 0]
    assert first[1]["text"] == first[0]["text"] == first[0]["parsed"] and first[1]["parsed"] == ""
    assert second[1]["text"] == f"{second[0]['parsed']}\n{second[1]['parsed']}"
    rows = [r["values"] for r in read_metrics(work / "metrics.jsonl") if r["stage"] == "extract"]
    assert [row["duplicates"] for row in rows] == [0.0, 0.5]
    assert [row["nothing_parsed"] for row in rows] == [0.0, 0.0]
    assert "1 item(s) left out that were known already" in capsys.readouterr().out
    plain = tmp_path / "plain"
    extracted(finished_run, plain)
    assert len(steps_of(plain)[0][1]["text"]) > len(first[1]["text"])


def test_upkeep_goes_on_after_a_kill(finished_run, tmp_path):
    settings = dict(extract__deduplicate=True)
    whole = extracted(finished_run, tmp_path / "a", **settings)
    work = tmp_path / "b"
    alone = extracted(finished_run, work, extract__chains=1, **settings)
    (work / "round_001" / "knowledge" / "chain_00" / "step_002.json").unlink()
    assert alone and extracted(finished_run, work, **settings) == whole


def test_without_upkeep_records_and_prompts_are_as_before(finished_run, tmp_path, asked):
    extracted(finished_run, tmp_path / "off")
    keys = set(steps_of(tmp_path / "off")[0][0])
    assert keys == {
        "chain", "step", "text", "parsed", "response", "thought_finished", "stopped",
        "response_tokens", "knowledge_tokens",
    }  # fmt: skip
    extracted(finished_run, tmp_path / "on", extract__no_op=True, extract__max_prompt=384)
    decode = load_tokenizer(tiny_config().model.path).decode
    shown = [decode(ids) for ids in asked]
    assert len(shown) == 8
    assert [knowledge.NO_OP in text for text in shown] == [False] * 4 + [True] * 4


# --- experience that no extractor writes ----------------------------------------------------------


def test_raw_trajectories_are_the_newest_games_that_fit(finished_run, tmp_path):
    work = tmp_path / "run"
    extracted(finished_run, work, extract__experience="raw", extract__l_max=10_000)
    for chain in range(2):
        games = read(work / "round_001" / "trajectories" / f"extract_{chain:04d}.jsonl")
        whole = ""
        for step, game in enumerate(games, 1):
            turns = [(turn.observation, turn.response) for turn in game.turns]
            whole += extraction_history(turns, game.outcome)
            record = read_json(
                work / "round_001" / "knowledge" / f"chain_{chain:02d}" / f"step_{step:03d}.json"
            )
            assert record["text"] == whole and record["response_tokens"] == 0
    short = tmp_path / "short"
    extracted(finished_run, short, extract__experience="raw")  # l_max 48
    count = load_tokenizer(tiny_config().model.path).encode
    for text in read_json(short / "round_001" / "knowledge" / "knowledge.json")["texts"]:
        assert 0 < len(count(text)) <= 48 and text.endswith("\n") and "Round0_Input" not in text


def test_texts_of_another_run(finished_run, tmp_path):
    work = tmp_path / "run"
    ours = extracted(finished_run, work, extract__knowledge_from=str(finished_run))
    assert ours == texts(finished_run)


def test_another_run_that_cannot_serve(finished_run, tmp_path):
    for changes, message in (
        ({"rounds": 2}, "round 2 has no finished extract stage"),
        ({"extract__chains": 3}, r"config\.extract\.chains=2, this run wants 3"),
    ):
        config = tiny_config(extract__knowledge_from=str(finished_run), **changes)
        with pytest.raises(UserError, match=message):
            check_other_run(config)
    with pytest.raises(UserError, match=r"config\.extract\.knowledge_from=.*there is no run"):
        check_other_run(tiny_config(extract__knowledge_from=str(tmp_path / "none")))
