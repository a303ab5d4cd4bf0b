"""Pre-flight: its games, its numbers, going on after a kill, and what follows from harm."""

import importlib
import itertools
import json
import shutil

import numpy as np
import pytest
from tiny_run import contents, copy_of, go, opened, results, tiny_config

from oel_jax import environments
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.chat.tokenizer import load_tokenizer
from oel_jax.config.fields import is_free
from oel_jax.data.messages import Context
from oel_jax.data.prompts import play_prompt
from oel_jax.report.intervals import paired_difference
from oel_jax.runs.metrics import read_metrics
from oel_jax.runs.stages import NAMES, stages_of
from oel_jax.sampler.sampler import Sampler

module = importlib.import_module("oel_jax.actor.preflight")

GOOD = "- EXPERIENCE ITEM: H is deadly.\n- EXPERIENCE ITEM: G wins the game."
PARTIAL = "- EXPERIENCE ITEM: H is deadly."
SIZE = 12  # games with each text


def config_of(**changes):
    return tiny_config(preflight__games=SIZE, **changes)


def with_texts(finished_run, workdir, *texts):
    """The finished run before consolidation, with texts of our own."""
    work = copy_of(finished_run, workdir, "consolidate", "evaluate")
    pool = work / "round_001" / "knowledge" / "knowledge.json"
    write_json(pool, read_json(pool) | {"texts": list(texts)})
    manifest = read_json(work / "manifest.json")
    for entry in manifest["stages"]:
        for file in entry["files"]:
            if file["path"] == "round_001/knowledge/knowledge.json":
                file["size"] = pool.stat().st_size
    write_json(work / "manifest.json", manifest)
    return work


def recorded(work, config):
    """Do the stage; returns the games that were played, in the order they ended."""
    played, record = [], module._record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_record", lambda game: (played.append(game), record(game))[1])
        go(work, config, ["preflight"], change=True)
    return played


@pytest.fixture(scope="module")
def flown(finished_run, tmp_path_factory):
    """(workdir after its pre-flight, the games); copy the workdir, do not change it."""
    work = with_texts(finished_run, tmp_path_factory.mktemp("preflight") / "run", PARTIAL, GOOD)
    return work, recorded(work, config_of())


# --- games and numbers ----------------------------------------------------------------------------


def test_every_text_is_played_on_the_boards_behind_those_of_training(flown):
    work, played = flown
    seeds = (
        environments.deploy_seeds(1, 4, 4)
        + environments.deploy_seeds(1, 5, 4)
        + environments.deploy_seeds(1, 6, 4)
    )
    assert len(played) == 3 * SIZE
    for text in ("", PARTIAL, GOOD):
        assert [game.job.seed for game in played if game.job.context.text == text] == seeds
    tokenizer = load_tokenizer(config_of().model.path)
    for game in played:
        for turn in game.turns:
            prompt = play_prompt(turn.messages[0]["content"], game.job.context.text)
            assert list(turn.prompt_ids) == tokenizer.chat(prompt, thinking=True)
    assert len({(game.job.key, game.job.chain) for game in played}) == 1  # the same chances
    # No text waits until another has ended: their openings are side by side in the sampler.
    assert len({game.job.context.text for game in played[:2]}) == 2
    trained = {seed for step in (1, 2, 3) for seed in environments.deploy_seeds(1, step, 4)}
    others = set(environments.heldout_seeds()) | set(environments.extraction_seeds(1, 2))
    assert len(set(seeds)) == SIZE and not set(seeds) & (trained | others)


def test_the_boards_are_as_many_as_asked_for(finished_run, tmp_path):
    for count, steps in ((3, 1), (4, 1), (9, 3)):
        with opened(tmp_path / str(count), tiny_config(preflight__games=count)) as run:
            behind = [
                s for step in range(4, 4 + steps) for s in environments.deploy_seeds(2, step, 4)
            ]
            assert module.preflight_boards(run.config, 2) == behind[:count]


def test_the_numbers_are_a_plain_count_of_the_games(flown):
    work, played = flown
    result = read_json(work / "round_001" / "preflight.json")
    seeds = sorted({game.job.seed for game in played})
    won = {(game.job.context.text, game.job.seed): game.game.passed for game in played}
    wins = {text: sum(won[text, seed] for seed in seeds) for text in ("", PARTIAL, GOOD)}
    assert 0 < wins[PARTIAL] < wins[GOOD]  # else this shows little
    assert result["without"]["pass_rate"] == wins[""] / SIZE
    boards = environments.board_ids("frozen_lake", seeds)
    assert (result["games"], result["boards"]) == (SIZE, len(set(boards)))
    rows = {text: np.array([won[text, seed] for seed in seeds]) for text in wins}
    for chain, text in enumerate((PARTIAL, GOOD)):
        entry = result["texts"][chain]
        assert entry["chain"] == chain
        assert entry["pass_rate"] == wins[text] / SIZE
        assert entry["gain"] == pytest.approx((wins[text] - wins[""]) / SIZE)
        assert entry["passed"] == "".join("01"[won[text, seed]] for seed in seeds)
        _, low, high = paired_difference(rows[text][None, None], rows[""][None, None], boards)
        assert entry["ci95"] == [low, high] and low <= entry["gain"] <= high
        lengths = [n for game in played if game.job.context.text == text for n in game.tokens]
        assert entry["response_tokens"] == pytest.approx(sum(lengths) / len(lengths))
    expected = (wins[PARTIAL] + wins[GOOD]) / (2 * SIZE) - wins[""] / SIZE
    assert result["gain"] == pytest.approx(expected)
    both = np.stack([rows[PARTIAL], rows[GOOD]])[None]
    assert result["ci95"] == list(paired_difference(both, rows[""][None, None], boards)[1:])
    (row,) = [r for r in read_metrics(work / "metrics.jsonl") if r["stage"] == "preflight"]
    assert (row["round"], row["step"]) == (1, 1)
    assert row["values"]["gain"] == pytest.approx(expected)
    assert row["values"]["games"] == 3 * SIZE
    assert row["values"]["turns"] == pytest.approx(np.mean([len(g.turns) for g in played]))
    gains = [entry["gain"] for entry in result["texts"]]
    assert row["values"]["least_text_gain"] == min(gains)
    assert row["values"]["greatest_text_gain"] == max(gains) > 0  # knowledge helps the nano model


def test_empty_and_equal_texts_are_not_played_twice(finished_run, flown, tmp_path):
    work = with_texts(finished_run, tmp_path / "run", "", GOOD, PARTIAL, f"\n{PARTIAL}\n")
    played = recorded(work, config_of(extract__chains=4))
    assert {game.job.context.text for game in played} == {"", GOOD, PARTIAL}
    assert len(played) == 3 * SIZE
    result = read_json(work / "round_001" / "preflight.json")
    empty, good, one, other = result["texts"]
    assert (empty["gain"], empty["ci95"]) == (0.0, [0.0, 0.0])
    assert one == other | {"chain": 2}
    assert result["gain"] == pytest.approx((good["gain"] + 2 * one["gain"]) / 4)
    # Chances do not depend on which other texts are played at the same time, or in which order.
    other_order = read_json(flown[0] / "round_001" / "preflight.json")
    assert one | {"chain": 0} == other_order["texts"][0]
    assert result["without"] == other_order["without"]


def test_the_console_shows_each_text_and_the_gain_in_context(flown, tmp_path, capsys):
    work = tmp_path / "run"
    shutil.copytree(flown[0], work)
    with opened(work, config_of()) as run:
        module.preflight(run, 1)
    result, out = read_json(work / "round_001" / "preflight.json"), capsys.readouterr().out
    low, high = (f"{100 * end:+.1f}" for end in result["ci95"])
    gain = f"{100 * result['gain']:+.1f} points [{low}, {high}]"
    assert f"gain in context, the mean over the texts: {gain}" in out
    assert "predict" not in out  # it is measured before consolidation, and says nothing of its end
    for chain in (0, 1):
        (line,) = [line for line in out.splitlines() if f"text of chain {chain}" in line]
        assert f"{result['texts'][chain]['pass_rate']:.1%}" in line


# --- going on -------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run at once; nothing in the package catches it."""


def test_a_killed_preflight_goes_on_and_plays_nothing_twice(finished_run, flown, tmp_path):
    work = with_texts(finished_run, tmp_path / "run", PARTIAL, GOOD)
    log = work / "round_001" / "preflight.games.jsonl"
    record, count = module._record, itertools.count()

    def dying(game):
        if next(count) == 7:
            raise Killed
        return record(game)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "_record", dying)
        go(work, config_of(), ["preflight"], change=True)
    assert log.read_bytes().count(b"\n") == 7
    with log.open("ab") as file:
        file.write(b'{"context": 1, "col')  # a kill in the middle of a write
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):

        def killed(*_):
            raise Killed

        patch.setattr(module, "write_json", killed)  # after the last game
        go(work, config_of(), ["preflight"])
    assert log.read_bytes().count(b"\n") == 3 * SIZE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "poll", None)  # no token can be sampled
        go(work, config_of(), ["preflight"])
    assert not log.exists()
    assert results(work) == results(flown[0])


def test_games_of_another_config_are_played_again(flown, tmp_path):
    """The lines of a log count as long as they are games that are due."""
    from oel_jax.actor import recording

    jobs = [module.Job(1, (), tag=tag) for tag in ((1, 0), (0, 1))]
    log = recording.GameFile(tmp_path / "x.games.jsonl", jobs)
    due = [{"context": 1, "column": 0}, {"context": 0, "column": 1}]
    old = [due[1], {"context": 7, "column": 0}, due[0]]
    log.path.write_text("".join(json.dumps(record) + "\n" for record in old))
    form = recording.Format(module._record, module._name, lambda job: list(job.tag))
    recording.record_games([log], form, None, "x", 0.0)  # there is nothing to play
    assert recording.read_records(log, form) == due


# --- what follows ---------------------------------------------------------------------------------


def judged(work, tmp_path, **changes):
    """Judge a finished pre-flight under other settings."""
    copy = tmp_path / f"judged {len(list(tmp_path.iterdir()))}"
    shutil.copytree(work, copy)
    with opened(copy, config_of(**changes)) as run:  # both fields are free: nothing is refused
        module.check_gain(run, 1)


def test_warn_and_stop_follow_from_the_gain_and_its_interval(flown, tmp_path, capsys):
    result = read_json(flown[0] / "round_001" / "preflight.json")
    gain, (low, high) = result["gain"], result["ci95"]
    assert -1 < low < gain < high < 1
    below, between, above = gain - 0.01, (gain + high) / 2, (high + 1) / 2
    for on_harm in ("warn", "stop"):
        judged(flown[0], tmp_path, preflight__least_gain=below, preflight__on_harm=on_harm)
        assert "WARNING" not in capsys.readouterr().out
        judged(flown[0], tmp_path, preflight__least_gain=between, preflight__on_harm=on_harm)
        out = capsys.readouterr().out
        assert "WARNING: round 1: knowledge does not help" in out and "leaves room" in out
    judged(flown[0], tmp_path, preflight__least_gain=above)
    out = capsys.readouterr().out
    said = "WARNING: round 1: knowledge does not help enough in context: the gain in context is "
    assert f"{said}{100 * gain:+.1f} points" in out
    assert "leaves room" not in out
    with pytest.raises(UserError) as caught:
        judged(flown[0], tmp_path, preflight__least_gain=above, preflight__on_harm="stop")
    for words in (
        f"{100 * gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]",
        "config.preflight.on_harm='stop'",
        f"config.preflight.least_gain={above:g}",
        "config.extract.n",
        "extract.l_max",
        "config.extract.model_path",
        "--config.preflight.on_harm=warn",
    ):
        assert words in str(caught.value)


def test_a_gain_of_nothing_is_no_gain(finished_run, tmp_path, capsys):
    """Nobody wins with or without: the mean gain is 0, which is not above 0."""
    work = with_texts(finished_run, tmp_path / "run", "", PARTIAL)
    result = {"gain": 0.0, "ci95": [-0.2, 0.2]}
    go(work, tiny_config(preflight__games=1, preflight__on_harm="stop"), ["preflight"], change=True)
    file = work / "round_001" / "preflight.json"
    measured = read_json(file)
    write_json(file, measured | result)
    capsys.readouterr()
    with opened(work, tiny_config(preflight__games=1, preflight__on_harm="stop")) as run:
        run.workdir.finish(1, "preflight", [file], 0.0)
        module.check_gain(run, 1)
    assert "WARNING: round 1: knowledge does not help in context" in capsys.readouterr().out


def test_a_stopped_run_goes_on_with_warn(flown, finished_run, tmp_path, monkeypatch, capsys):
    work = tmp_path / "run"
    shutil.copytree(flown[0], work)
    stages = ["preflight", "consolidate"]
    harmed = dict(preflight__least_gain=1.0)
    for _ in range(2):  # the same command stops again, and plays nothing again
        with monkeypatch.context() as patch, pytest.raises(UserError, match="on_harm='stop'"):
            patch.setattr(Sampler, "poll", None)
            go(work, config_of(preflight__on_harm="stop", **harmed), stages)
    assert not contents(work, "round_001/policy/*") and not contents(work, "round_001/consolidate*")
    capsys.readouterr()
    go(work, config_of(**harmed), stages)
    out = capsys.readouterr().out
    assert "WARNING: round 1" in out and "round 1 consolidate: done" in out
    assert (work / "round_001" / "policy" / "model.safetensors").exists()
    # Pre-flight leaves consolidation as it is, byte for byte.
    plain = with_texts(finished_run, tmp_path / "plain", PARTIAL, GOOD)
    go(plain, tiny_config(), ["consolidate"])
    policy = "round_001/policy/*"
    assert contents(work, policy) == contents(plain, policy)


def test_a_negative_control_gets_no_advice(flown, tmp_path, capsys):
    work = tmp_path / "run"
    shutil.copytree(flown[0], work)
    broken = config_of(preflight__least_gain=1.0, negative_control="shuffled_knowledge")
    with opened(work, broken, change=True) as run:
        module.check_gain(run, 1)
    out = capsys.readouterr().out
    assert "broken on purpose" in out and "extract.n" not in out and "WARNING" not in out


def test_stop_needs_a_measurement(finished_run, tmp_path, capsys):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    with opened(work, config_of(), change=True) as run:
        module.check_gain(run, 1)  # to warn, it is only useful
    assert "preflight is not among --stages and was not done before" in capsys.readouterr().out
    with pytest.raises(UserError, match="round 1: consolidate needs preflight first"):
        go(work, config_of(preflight__on_harm="stop"), ["consolidate"], change=True)


# --- the stage among the others -------------------------------------------------------------------


def test_the_stage_stands_between_extraction_and_consolidation():
    names = ("deploy", "extract", "review", "demonstrate", "preflight", "consolidate", "evaluate")
    assert names == NAMES
    for games_, mode in itertools.product((0, 1), ("on_policy", "off_policy")):
        config = tiny_config(preflight__games=games_, consolidate__mode=mode)
        expected = set(names) - {"review"}
        expected -= set() if games_ else {"preflight"}
        expected -= {"demonstrate"} if mode == "on_policy" else set()
        assert [one.name for one in stages_of(config)] == [n for n in names if n in expected]
    old = stages_of({"consolidate": {}})  # a run from before the stage
    assert "preflight" not in [one.name for one in old]


def test_which_settings_may_change_in_a_workdir():
    assert is_free("preflight.on_harm") and is_free("preflight.least_gain")
    assert not is_free("preflight.games")


def test_without_games_there_is_no_preflight(finished_run):
    assert not list(finished_run.glob("round_001/preflight*"))
    assert "preflight" not in {row["stage"] for row in read_metrics(finished_run / "metrics.jsonl")}


def test_it_waits_for_the_texts(tmp_path, finished_run):
    work = copy_of(finished_run, tmp_path / "run", "extract", "consolidate", "evaluate")
    with pytest.raises(UserError, match="round 1: preflight needs extract first"):
        go(work, config_of(), ["preflight"], change=True)


# --- no experience at all -------------------------------------------------------------------------


def test_a_run_without_experience(finished_run, tmp_path, monkeypatch, capsys):
    """K empty texts: the teacher is the student's start, so the first step has nothing to learn."""
    work = copy_of(finished_run, tmp_path / "run", "extract", "consolidate", "evaluate")
    seen, recording = [], importlib.import_module("oel_jax.actor.recording")
    play = recording.play

    def watched(player, jobs, progress):
        for game in play(player, jobs, progress):
            seen.append(game)
            yield game

    monkeypatch.setattr(recording, "play", watched)
    config = config_of(
        extract__experience="none",
        consolidate__steps=1,
        preflight__on_harm="stop",
        preflight__least_gain=0.5,  # which nothing can reach here: it is a control, not an accident
    )
    go(work, config, change=True)
    out = capsys.readouterr().out
    assert "WARNING" not in out
    knowledge = work / "round_001" / "knowledge"
    assert read_json(knowledge / "knowledge.json")["texts"] == ["", ""]
    assert len(list(knowledge.glob("chain_*/step_*.json"))) == 4
    result = read_json(work / "round_001" / "preflight.json")
    assert (result["gain"], result["ci95"]) == (0.0, [0.0, 0.0])
    assert [entry["gain"] for entry in result["texts"]] == [0.0, 0.0]
    rows = read_metrics(work / "metrics.jsonl")
    (flight,) = [row["values"] for row in rows if row["stage"] == "preflight"]
    assert flight["games"] == SIZE
    (step,) = [row["values"] for row in rows if row["stage"] == "consolidate"]
    assert abs(step["kl"]) < 1e-5
    assert len(seen) == SIZE + 2 * 8  # pre-flight, in context and consolidated
    assert not any(game.job.context.text for game in seen)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("consolidate__mode", "sft"),
        ("evaluate__in_context", True),
        ("evaluate__curve", (1,)),
        ("negative_control", "shuffled_knowledge"),
    ],
)
def test_own_games_go_with_on_policy_distillation_alone(field, value):
    from oel_jax.config.checks import validate

    settings = {"extract__experience": "own_game", "evaluate__in_context": False} | {field: value}
    with pytest.raises(UserError, match=f"{field.replace('__', '.')} is .*own_game"):
        validate(tiny_config(**settings))


def test_each_prefix_is_read_with_its_own_game(finished_run, tmp_path, monkeypatch, capsys):
    """Per-sample context: what the teacher reads is the game the prefix is from, to its end."""
    import numpy as np

    from oel_jax.data.trajectories import decision_points
    from oel_jax.data.trajectory_files import read

    work = copy_of(finished_run, tmp_path / "run", "extract", "consolidate", "evaluate")
    stage = importlib.import_module("oel_jax.learner.consolidate")
    made, teachers, roll = [], [], stage.student_samples

    def recording(*arguments):
        samples, stopped = roll(*arguments)
        made.append(samples)
        teachers.append(arguments[4])
        return samples, stopped

    monkeypatch.setattr(stage, "student_samples", recording)
    config = config_of(
        extract__experience="own_game",
        extract__l_max=1200,
        sampler__max_len=0,
        evaluate__in_context=False,
        consolidate__steps=1,
    )
    go(work, config, ["extract", "preflight", "consolidate"], change=True)
    assert "WARNING" not in capsys.readouterr().out
    assert not (work / "round_001" / "preflight.json").exists()
    games = read(work / "round_001" / "trajectories" / "deploy_0000.jsonl")
    (samples,), (teacher, *_) = made, teachers
    tokenizer = teacher.model.tokenizer
    for prefix, sample in zip(decision_points(games), samples, strict=True):
        game = games[prefix.episode]
        cached = teacher.prefix(sample.knowledge).ids[: sample.shared]
        text = tokenizer.decode([*cached, *sample.suffix])
        assert game.outcome.strip().splitlines()[-1] in text
        assert all(turn.response.strip() in text for turn in game.turns)
        assert text.count("Round0_Input") == 1
    assert len({tuple(sample.suffix) for sample in samples}) > 1
    rows = read_metrics(work / "metrics.jsonl")
    (step,) = [row["values"] for row in rows if row["stage"] == "consolidate"]
    assert step["kl"] > 1e-3 and np.isfinite(step["loss"])  # the game's end changes the answers


def test_demonstrations_without_experience_are_plain_games(finished_run, tmp_path):
    from oel_jax.data.trajectory_files import read

    work = copy_of(finished_run, tmp_path / "run", "extract", "consolidate", "evaluate")
    config = tiny_config(extract__experience="none", consolidate__mode="off_policy")
    go(work, config, ["extract", "demonstrate"], change=True)
    played = read(work / "round_001" / "trajectories" / "demonstrate_0000.jsonl")
    assert len(played) == 4
    assert {game.context for game in played} == {Context("none", "")}
