"""Studies: what runs share, resuming, failures, expectations, bad input, the shipped files."""

import csv
import importlib
import json
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path

import jax
import pytest
from tiny_run import ROOT, contents, go, opened, results, tiny_config

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.config.command_line import read_overrides
from oel_jax.config.field import PARTS
from oel_jax.config.fields import is_free, leaves, unaffected
from oel_jax.config.file import load_module
from oel_jax.data.line_files import LineWriter
from oel_jax.report import page as report
from oel_jax.runs.workdir import Workdir
from oel_jax.sampler.sampler import Sampler
from oel_jax.study import command as command
from oel_jax.study import shares
from oel_jax.study import shelf as shelf_module
from oel_jax.study.command import Expectation, Measure, Other, Plot, Study, Variant
from oel_jax.study.definitions import Planned, load, runs
from oel_jax.study.results import Results
from oel_jax.study.shares import counted
from oel_jax.study.shelf import Shelf

loop = importlib.import_module("oel_jax.loop")
deploy, extract, consolidate, preflight, skills, round_evaluation = (
    importlib.import_module(f"oel_jax.{name}")
    for name in (
        "actor.deploy",
        "learner.extract",
        "learner.consolidate",
        "actor.preflight",
        "nano.skills",
        "actor.round_evaluation",
    )
)
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.py"))
START, CONTEXT, AFTER = "start", "in context", "after"
MEASURES = (
    Measure(START, "start"),
    Measure(CONTEXT, "in_context", 1),
    Measure(AFTER, "consolidated", 1),
    Measure("tokens", "consolidated", 1, value="response_tokens"),
    Measure("shorter", "consolidated", 1, value="response_tokens", per_start=True),
    Measure("entropy", stage="consolidate", round=1, value="student_entropy"),
)


def tiny_study(**changes) -> Study:
    """Two variants that differ in the learning rate alone."""
    study = Study(
        config=tiny_config(),
        variants=(Variant("slow"), Variant("fast", {"consolidate.learning_rate": 1e-3})),
        seeds=(0,),
        measures=MEASURES,
        baseline="slow",
        paper={("fast", AFTER): 0.25},
        plots=(
            Plot("dots", "dots", (START, CONTEXT, AFTER)),
            Plot("line", "line", (START, CONTEXT, AFTER), kind="line", breaks=(1,)),
        ),
        name="tiny",
        preset="nano",
    )
    return replace(study, **changes)


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory) -> Path:
    """Workdir of `tiny_study()`; copy it, do not change it."""
    root = tmp_path_factory.mktemp("studies") / "tiny"
    assert run_study(tiny_study(), root) == (True, True)
    return root


def run_study(study: Study, root: Path) -> tuple[bool, bool]:
    """As the command runs it, on one of the tests' eight devices."""
    return command.run(study, root, jax.devices()[:1])


@pytest.fixture
def one_device(monkeypatch):
    """The command, too, uses one of the eight devices."""
    run, devices = command.run, jax.devices()[:1]
    monkeypatch.setattr(command, "run", lambda study, root: run(study, root, devices))


# --- sharing --------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_sharing_equals_not_sharing_byte_for_byte(finished_study, finished_run, tmp_path):
    go(tmp_path / "fast", tiny_config(consolidate__learning_rate=1e-3))
    for shared, alone in (("slow", finished_run), ("fast", tmp_path / "fast")):
        found, expected = results(finished_study / shared / "seed_0"), results(alone)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
    slow, fast = (finished_study / name / "seed_0" for name in ("slow", "fast"))
    same = {"evaluate/start.json", "round_001/evaluate/in_context.json"}
    same |= contents(slow, "round_001/trajectories/*", "round_001/knowledge/**/*").keys()
    assert len(same) == 2 + 5 + 5
    for name in same:
        assert (slow / name).samefile(fast / name), name
    for name in ("policy/model.safetensors", "evaluate/consolidated.json"):
        assert not (slow / "round_001" / name).samefile(fast / "round_001" / name)
    with Workdir(fast).open(read_json(fast / "config.json")) as workdir:
        for stage in ("deploy", "extract", "consolidate", "evaluate"):
            workdir.verify(1, stage)


def test_equal_variants_compute_nothing_twice(finished_study, tmp_path, monkeypatch):
    root = tmp_path / "study"
    shutil.copytree(finished_study, root)
    twin = Variant("twin", {"consolidate.learning_rate": 1e-3, "consolidate.save_every": 2})
    study = tiny_study(variants=(*tiny_study().variants, twin))
    monkeypatch.setattr(Sampler, "poll", None)  # no token can be sampled
    monkeypatch.setattr(consolidate, "update", None)
    assert run_study(study, root) == (True, True)
    found, expected = (results(root / name / "seed_0") for name in ("twin", "fast"))
    assert found == expected


@pytest.mark.e2e
def test_a_deployment_is_shared_in_parts(finished_study, tmp_path, monkeypatch):
    """More steps and other chains: what is equal is linked, the rest is played."""
    root = tmp_path / "study"
    shutil.copytree(finished_study, root)
    played = []
    write = LineWriter.write
    monkeypatch.setattr(
        LineWriter,
        "write",
        lambda self, game: (played.append(self.path.name), write(self, game)),
    )
    more = Variant("more", {"consolidate.steps": 4}, stages=("deploy",))
    one = Variant("one", {"extract.chains": 1}, stages=("deploy",))
    run_study(tiny_study(variants=(*tiny_study().variants, more, one)), root)
    assert sorted(set(played)) == ["deploy_0003.jsonl", "extract_0000.jsonl"]
    go(tmp_path / "alone", tiny_config(consolidate__steps=4), ["deploy"])
    games = contents(root / "more" / "seed_0", "round_001/trajectories/*")
    assert games == contents(tmp_path / "alone", "round_001/trajectories/*")


@pytest.mark.e2e
def test_demonstrations_are_shared(finished_study, tmp_path, monkeypatch):
    """Both off-policy baselines train on the same games."""
    root = tmp_path / "study"
    shutil.copytree(finished_study, root)
    stages = ("deploy", "extract", "demonstrate")
    variants = tuple(
        Variant(mode, {"consolidate.mode": mode}, stages=stages) for mode in ("off_policy", "sft")
    )
    study = tiny_study(variants=(tiny_study().variants[0], *variants), paper={})
    assert run_study(study, root) == (True, True)
    files = contents(root / "off_policy" / "seed_0", "round_001/trajectories/demonstrate_*")
    assert len(files) == 3
    for name in files:
        assert (root / "sft/seed_0" / name).samefile(root / "off_policy/seed_0" / name)
        assert not (root / "sft/seed_0" / name.replace("demonstrate", "deploy")).samefile(
            root / "sft/seed_0" / name
        )
    rows = [results(root / v.name / "seed_0")["metrics"] for v in variants]
    assert rows[0] == rows[1] and "demonstrate" in {row["stage"] for row in rows[0]}


@pytest.mark.e2e
def test_a_preflight_is_shared(finished_study, tmp_path, capsys):
    """It does not depend on how the texts are consolidated, nor on what follows from it."""
    root = tmp_path / "study"
    shutil.copytree(finished_study, root)
    stages, on = ("deploy", "extract", "preflight"), {"preflight.games": 2}
    variants = (
        Variant("a", on, stages=stages),
        Variant("b", on | {"consolidate.learning_rate": 0.5}, stages=stages),
        Variant("c", on | {"preflight.on_harm": "stop"}, stages=stages),
        Variant("d", {"preflight.games": 3}, stages=stages),
    )
    run_study(tiny_study(variants=(*tiny_study().variants, *variants)), root)
    said = [part.split("/", 1) for part in capsys.readouterr().out.split("##### ")[1:]]
    assert [run for run, rest in said if "round 1 preflight: 0/" in rest] == ["a", "d"]
    name = "round_001/preflight.json"
    for twin in "bc":
        assert (root / twin / "seed_0" / name).samefile(root / "a" / "seed_0" / name)
    rows = [results(root / v.name / "seed_0")["metrics"] for v in variants]
    assert rows[0] == rows[1] == rows[2] != rows[3]
    assert "preflight" in {row["stage"] for row in rows[0]}


def test_files_are_copied_where_they_cannot_be_linked(tmp_path, monkeypatch):
    source, target = tmp_path / "a" / "x.json", tmp_path / "b" / "c" / "x.json"
    source.parent.mkdir()
    source.write_bytes(b"new")

    def refuse(*_):
        raise OSError("cross-device link")

    for link in (True, False):
        with monkeypatch.context() as patch:
            if not link:
                patch.setattr(shelf_module.os, "link", refuse)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"old")
            shelf_module._place(source, target)
        assert target.read_bytes() == b"new" and target.samefile(source) == link
        assert [path.name for path in target.parent.iterdir()] == ["x.json"]
        target.unlink()


# Another legal value of every field that some stage leaves out.
OTHER = {
    "preset": "paper",
    "loss.divergence": "forward",
    "loss.support": "union",
    "loss.correction": "renorm",
    "loss.top_k": 8,
    "loss.temperature": 1.5,
    "loss.aggregation": "seq_mean",
    "consolidate.steps": 2,
    "consolidate.learning_rate": 1e-2,
    "consolidate.b1": 0.5,
    "consolidate.b2": 0.5,
    "consolidate.eps": 1e-3,
    "consolidate.weight_decay": 0.5,
    "consolidate.clip_norm": 0.01,
    "consolidate.token_budget": 512,
    "consolidate.temperature": 1.3,
    "consolidate.keep_fp32_master": True,
    "consolidate.drop_remainder": 3,
    "consolidate.moments_dtype": "bfloat16",
    "consolidate.teacher_dtype": "bfloat16",
    "consolidate.mode": "off_policy",
    "consolidate.turn_fraction": 0.5,
    "consolidate.turn_floor": 0.001,
    "consolidate.retention": "plain",
    "consolidate.retention_weight": 0.7,
    "consolidate.teacher": "trust_region",
    "consolidate.teacher_rate": 0.3,
    "lora.rank": 3,
    "lora.alpha": 7.0,
    "lora.targets": ("q", "v"),
    "guard.response_tokens": (0.1, 9.0),
    "guard.entropy": (0.1, 9.0),
    "guard.skill_drop": 0.9,
    "evaluate.steps": (1,),
    "deploy.temperature": 1.3,
    "deploy.top_p": 0.5,
    "deploy.top_k": 3,
    "deploy.games_per_step": 3,
    "extract.n": 1,
    "extract.version": "v3",
    "extract.previous": False,
    "extract.l_max": 40,
    "extract.max_prompt": 250,
    "extract.outcome": "none",
    "extract.history_markers": "tokens",
    "extract.item_marker": "-- EXPERIENCE ITEM:",
    "extract.template_file": "paper",
    "model.check_weights": False,
    "extract.unfinished_thought": "keep",
    "extract.truncate": "head",
    "extract.drop_quotes": True,
    "extract.user_share": 0.5,
    "extract.history": "reactions",
    "logs.path": ("elsewhere/*.jsonl",),
    "evaluate.conversations": 3,
    "evaluate.text_file": "elsewhere.txt",
    "evaluate.scorer": "elsewhere.py:score",
    "extract.place": "user",
    "extract.draft_tokens": 2,
    "extract.model_path": "nano:tiny",
    "extract.experience": "raw",
    "extract.knowledge_from": "elsewhere",
    "extract.deduplicate": True,
    "extract.no_op": True,
    "preflight.games": 3,
    "extract.chains": 1,
    "extract.n_run": 3,
    "extract.temperature": 1.3,
    "extract.top_p": 0.5,
    "extract.top_k": 3,
    "extract.trajectories": "shared",
    "evaluate.maps": 3,
    "evaluate.seeds": 1,
    "evaluate.temperature": 1.3,
    "evaluate.top_p": 0.5,
    "evaluate.top_k": 3,
    "evaluate.unseen_split": False,
    "evaluate.seed_mode": "constant",
    "evaluate.in_context": False,
    "evaluate.curve": (1,),
    "evaluate.skills": True,
}
BY_CONTENT = {"model.path", "extract.model_path", "extract.template_file", "extract.knowledge_from"}


def changed(fields) -> object:
    """The tiny config with all these fields changed at once."""
    config = tiny_config()
    known = leaves(config.to_dict())
    with config.ignore_type():
        config.update_from_flattened_dict({name: OTHER[name] for name in fields if name in known})
    return config


def test_every_left_out_field_exists_and_is_tried():
    known = set(leaves(tiny_config().to_dict()))
    named = set().union(*map(unaffected, PARTS))
    assert named <= known
    assert named - {"model.path"} <= OTHER.keys()
    for name in named - {"model.path"}:
        assert changed([name]).to_dict() != tiny_config().to_dict(), name


@pytest.mark.parametrize("kind", PARTS)
def test_any_other_field_changes_the_key(kind):
    """What is not left out counts, fields that nobody has thought of included."""
    config = tiny_config()
    config.consolidate.invented = 1
    fields = counted(config, unaffected(kind))
    everything = leaves(config.to_dict())
    free = {name for name in everything if is_free(name)}
    assert set(fields) == set(everything) - free - unaffected(kind)
    assert "consolidate.invented" in fields and "seed" in fields and "game.name" in fields
    assert free


def _undone(finished_run, tmp_path, config, *places):
    """A copy of the finished run without some files, opened with another config."""
    work = tmp_path / "run"
    shutil.copytree(finished_run, work)
    for place in places:
        path = work / place
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return opened(work, config, change=True)


@pytest.mark.e2e
@pytest.mark.parametrize("kind", sorted(PARTS))
def test_left_out_fields_leave_the_files_byte_for_byte(kind, finished_run, tmp_path):
    """All of them changed at once; a field that mattered would show in the bytes."""
    out = unaffected(kind) - BY_CONTENT
    first, config = "round_001", changed(out)
    if kind == "demonstrate":  # no part of the finished run
        shutil.copytree(finished_run, tmp_path / "plain")
        with opened(tmp_path / "plain", tiny_config(), change=True) as run:
            deploy.demonstrate(run, 1)
        config.consolidate.steps = 2
        with _undone(finished_run, tmp_path, config) as run:
            deploy.demonstrate(run, 1)
        (tmp_path / "plain" / first / "trajectories" / "demonstrate_0002.jsonl").unlink()
        finished_run, pattern = tmp_path / "plain", f"{first}/trajectories/demonstrate_*"
    elif kind == "preflight":  # no part of the finished run either
        work = tmp_path / "plain"
        shutil.copytree(finished_run, work)
        with opened(work, tiny_config(preflight__games=4), change=True) as run:
            preflight.preflight(run, 1)
        config.preflight.games = 4
        with _undone(finished_run, tmp_path, config) as run:
            preflight.preflight(run, 1)
        finished_run, pattern = work, f"{first}/preflight.json"
    elif kind == "chains":
        with _undone(finished_run, tmp_path, config, f"{first}/trajectories") as run:
            deploy.deploy(run, 1)
        pattern = f"{first}/trajectories/extract_*"
    elif kind == "deploy":
        config.consolidate.steps = 4
        with _undone(finished_run, tmp_path, config, f"{first}/trajectories") as run:
            deploy.deploy(run, 1)
        (run.workdir.trajectories(1) / "deploy_0003.jsonl").unlink()
        pattern = f"{first}/trajectories/deploy_*"
    elif kind in ("knowledge", "extract"):
        with _undone(finished_run, tmp_path, config, f"{first}/knowledge") as run:
            extract.extract(run, 1)
        pattern = f"{first}/knowledge/" + ("chain_*/*" if kind == "knowledge" else "**/*")
    elif kind == "consolidate":
        places = (f"{first}/policy", f"{first}/consolidate")
        with _undone(finished_run, tmp_path, config, *places) as run:
            consolidate.consolidate(run, 1)
        pattern = f"{first}/policy/*"
    elif kind == "skills":  # no part of the finished run
        policy, places = finished_run / first / "policy", []
        for number, one in enumerate((tiny_config(), config)):
            places.append(tmp_path / f"{number}.json")
            skills.evaluate_skills(one, policy, places[-1])
        assert places[0].read_bytes() == places[1].read_bytes()
        return
    elif kind == "start":
        with _undone(finished_run, tmp_path, config, "evaluate") as run:
            round_evaluation.evaluate_start(run)
        pattern = "evaluate/start.*"
    else:
        config.evaluate.in_context = kind == "with_knowledge"
        name = {"with_knowledge": "in_context"}.get(kind, kind)
        with _undone(finished_run, tmp_path, config, f"{first}/evaluate") as run:
            round_evaluation.evaluate_round(run, 1)
        pattern = f"{first}/evaluate/{name}*"
    found, expected = contents(tmp_path / "run", pattern), contents(finished_run, pattern)
    assert expected and found == expected


@pytest.mark.parametrize("kind", ["with_knowledge", "consolidated"])
def test_the_amount_of_play_counts_only_where_boards_seen_do(kind):
    """Without the split, evaluations do not depend on which boards were deployed."""
    config = tiny_config(evaluate__unseen_split=False)
    less = tiny_config(evaluate__unseen_split=False, deploy__games_per_step=3)
    keys = []
    for one in (config, less, tiny_config(), tiny_config(deploy__top_k=3)):
        keys.append(shares.share_key(one, 1, kind, "x", []))
        assert shares.share_key(one, 1, kind, "y", []) != keys[-1]
    assert keys[0] == keys[1] and keys[2] == keys[3] and keys[0] != keys[2]


def test_content_counts_not_the_path(finished_run, tmp_path):
    """A copy of the model gives the same keys; a changed model, template or knowledge others."""
    model = tmp_path / "model"
    shutil.copytree(tiny_config().model.path, model)
    work = tmp_path / "run"
    shutil.copytree(finished_run, work)

    def keys(**changes):
        stages = (shares.deploy, shares.extract, shares.consolidate, shares.evaluate)
        found = [stage(tiny_config(**changes), Workdir(work), 1) for stage in stages]
        return [[[part.key for part in one.parts] for one in found], [one.whole for one in found]]

    first = keys()
    assert keys(model__path=str(model)) == first
    assert keys(consolidate__save_every=3, sampler__slots=4) == first
    (model / "generation_config.json").write_text("{}")
    for ours, theirs in zip(keys(model__path=str(model)), first, strict=True):
        deployed, extracted, _, evaluated = zip(ours, theirs, strict=True)
        assert deployed[0] != deployed[1] and extracted[0] != extracted[1]
        if evaluated[0]:  # P_2 is its own file, whatever it was made from
            assert evaluated[0][0] != evaluated[1][0] and evaluated[0][1] == evaluated[1][1]
    template = tmp_path / "template.txt"
    template.write_text("{LATEST_EXPERIENCE} and {PREVIOUS_EXPERIENCE}")
    changed_file = work / "manifest.json"
    manifest = read_json(changed_file)
    for entry in manifest["stages"]:
        if (entry["round"], entry["stage"]) == (1, "extract"):
            entry["files"][0]["sha256"] = "0" * 64
    write_json(changed_file, manifest)
    after = keys()
    assert after[1][:2] == first[1][:2] and after[1][2] != first[1][2]


def test_a_damaged_or_stray_entry_is_not_taken(finished_study, tmp_path, capsys):
    root = tmp_path / "study"
    shutil.copytree(finished_study, root)
    shelf = read_json(root / "shelf.json")
    for entry in shelf["entries"].values():
        for file in entry["files"]:
            if file["path"].endswith("knowledge.json"):
                file["sha256"] = "0" * 64
            if file["path"].endswith("start.json"):
                file["path"] = "../" + file["path"]
    write_json(root / "shelf.json", shelf)
    twin = Variant("twin")
    run_study(tiny_study(variants=(*tiny_study().variants, twin)), root)
    out = capsys.readouterr().out
    assert "round 1 deploy: done" in out and "extract: done in" in out
    found, expected = (results(root / name / "seed_0") for name in ("twin", "slow"))
    assert found == expected
    knowledge = "round_001/knowledge/knowledge.json"
    assert not (root / "twin/seed_0" / knowledge).samefile(root / "slow/seed_0" / knowledge)


# --- going on, failing ----------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a study at once."""


@pytest.mark.e2e
def test_a_killed_study_goes_on(finished_study, tmp_path, monkeypatch):
    root, calls = tmp_path / "study", []
    update = consolidate.update

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # the second step of the second variant
            raise Killed
        return update(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(consolidate, "update", dying)
        run_study(tiny_study(), root)
    assert not (root / "results.json").exists()
    assert run_study(tiny_study(), root) == (True, True)
    for name in ("slow", "fast"):
        assert results(root / name / "seed_0") == results(finished_study / name / "seed_0")
    assert read_json(root / "results.json") == read_json(finished_study / "results.json")


@pytest.mark.e2e
def test_a_finished_study_computes_nothing_and_takes_more_seeds(
    finished_study, tmp_path, monkeypatch
):
    root = tmp_path / "study"
    shutil.copytree(finished_study, root)
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "poll", None)
        assert run_study(tiny_study(), root) == (True, True)
    assert read_json(root / "results.json") == read_json(finished_study / "results.json")
    two = tiny_study(seeds=(0, 1), measures=MEASURES[:1], variants=tiny_study().variants[:1])
    two = replace(two, paper={}, plots=())
    assert run_study(two, root)[0]
    (cell,) = read_json(root / "results.json")["cells"]
    assert cell["seeds"] == [0, 1]


def test_fewer_seeds_than_before_forget_no_numbers(tmp_path, capsys):
    study_module = importlib.import_module("oel_jax.study.command")
    write_json(tmp_path / "results.json", {"seeds": [2, 0, 1]})

    def seeds(*asked):
        study = tiny_study(seeds=asked)
        whole, planned = study_module._with_earlier_seeds(study, runs(study, tmp_path), tmp_path)
        assert {(run.variant.name, run.seed) for run in planned} == {
            (variant.name, seed) for variant in study.variants for seed in whole.seeds
        }
        return whole.seeds

    assert seeds(2, 0, 1) == (2, 0, 1) and capsys.readouterr().out == ""
    assert seeds(0, 5) == (2, 0, 1, 5)  # in the order of before, then what is new
    assert "also has 2, 1, which stay in tables and plots" in capsys.readouterr().out
    (tmp_path / "results.json").unlink()
    assert seeds(0) == (0,)


@pytest.mark.e2e
def test_a_failed_variant_is_reported_and_the_others_go_on(
    finished_study, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "study"
    shutil.copytree(finished_study, root)
    shutil.rmtree(root / "fast")
    real = extract.extract
    broken = Variant("broken", {"extract.l_max": 40})
    waiting = Variant("waiting", {"extract.knowledge_from": Other("broken")})
    study = tiny_study(variants=(broken, waiting, *tiny_study().variants))

    def failing(run, round_number):
        if run.config.extract.l_max == 40:
            raise RuntimeError("\x1b[31mout of luck")
        return real(run, round_number)

    with monkeypatch.context() as patch:
        patch.setattr(extract, "extract", failing)
        assert run_study(study, root) == (False, True)
    out = capsys.readouterr().out
    assert "FAILED: broken/seed_0: RuntimeError: ?[31mout of luck" in out
    assert "\x1b" not in out
    assert "waiting/seed_0: UserError: it needs the run of broken, which failed" in out
    assert "RuntimeError" in (root / "broken" / "seed_0" / "failure.txt").read_text()
    found = read_json(root / "results.json")
    assert sorted(found["failed"]) == ["broken/seed_0", "waiting/seed_0"]
    assert {cell["variant"] for cell in found["cells"]} == {"slow", "fast", "broken"}
    assert (root / "fast" / "seed_0" / "round_001" / "policy").is_dir()
    # Mended, the same command does what is missing and the old message is gone.
    assert run_study(study, root) == (True, True)
    assert not list(root.rglob("failure.txt"))
    texts = [
        read_json(root / name / "seed_0/round_001/knowledge/knowledge.json")["texts"]
        for name in ("broken", "waiting")
    ]
    assert texts[0] == texts[1]


# --- results --------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_runs(finished_study):
    found = read_json(finished_study / "results.json")
    cells = {(cell["variant"], cell["measure"]): cell for cell in found["cells"]}
    assert len(cells) == 2 * len(MEASURES)
    for variant in ("slow", "fast"):
        summary = read_json(finished_study / variant / "seed_0" / "summary.json")
        pairs = {
            START: summary["start"],
            CONTEXT: summary["rounds"][0]["in_context"],
            AFTER: summary["rounds"][0]["consolidated"],
        }
        for name, result in pairs.items():
            number = cells[variant, name]["number"]
            assert [number["mean"], number["low"], number["high"]] == pytest.approx(
                [result["pass_rate"], *result["ci95"]]
            )
        tokens = summary["rounds"][0]["consolidated"]["response_tokens"]
        assert cells[variant, "tokens"]["number"] == {"mean": tokens, "low": None, "high": None}
        ratio = tokens / summary["start"]["response_tokens"]
        assert cells[variant, "shorter"]["number"]["mean"] == pytest.approx(ratio)
        gain = pairs[AFTER]["pass_rate"] - pairs[START]["pass_rate"]
        assert cells[variant, AFTER]["to_start"]["mean"] == pytest.approx(gain)
        assert cells[variant, START]["to_start"] is None
    difference = cells["fast", AFTER]["to_baseline"]
    rates = [cells[name, AFTER]["number"]["mean"] for name in ("fast", "slow")]
    assert difference["mean"] == pytest.approx(rates[0] - rates[1])
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert cells["slow", AFTER]["to_baseline"] is None
    assert cells["fast", AFTER]["paper"] == 0.25 and cells["slow", AFTER]["paper"] is None
    rows = [
        json.loads(line)
        for line in (finished_study / "fast/seed_0/metrics.jsonl").read_text().splitlines()
    ]
    entropy = [r["values"]["student_entropy"] for r in rows if r["stage"] == "consolidate"]
    assert cells["fast", "entropy"]["number"]["mean"] == entropy[-1]


def test_csv_and_plots_are_there(finished_study):
    with (finished_study / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    cells = read_json(finished_study / "results.json")["cells"]
    assert [(row["variant"], row["measure"]) for row in rows] == [
        (cell["variant"], cell["measure"]) for cell in cells
    ]
    for row, cell in zip(rows, cells, strict=True):
        assert float(row["mean"]) == cell["number"]["mean"]
        assert row["paper"] == ("" if cell["paper"] is None else str(cell["paper"]))
    plots = contents(finished_study, "plots/*")
    assert sorted(plots) == [f"plots/{n}.{e}" for n in ("dots", "line") for e in ("png", "svg")]
    for name, data in plots.items():
        assert data.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
        assert len(data) > 5000
    assert b"fast: after" in plots["plots/dots.svg"] or b"<path" in plots["plots/dots.svg"]


def _judged(finished_study, expected) -> tuple[bool, str]:
    study = tiny_study(expectations=(expected,))
    verdict = Results(study, runs(study, finished_study), {}).verdicts[0]
    return verdict.held, verdict.numbers


def test_expectations_that_hold_and_that_do_not(finished_study):
    """`more` and `less` are two cells whose means differ, in this order."""
    study = tiny_study()
    cells = Results(study, runs(study, finished_study), {}).cells
    less, more = sorted(
        (("slow", name) for name in (START, CONTEXT, AFTER)),
        key=lambda point: cells[point].number.mean,
    )[::2]
    assert cells[less].number.mean < cells[more].number.mean
    assert _judged(finished_study, Expectation("e", more, less))[0]
    assert not _judged(finished_study, Expectation("e", less, more))[0]
    assert not _judged(finished_study, Expectation("e", more, more))[0]
    # Four maps are far too few for intervals that do not touch.
    assert cells[less].number.high > cells[more].number.low
    assert not _judged(finished_study, Expectation("e", more, less, apart=True))[0]
    held, numbers = _judged(
        finished_study, Expectation("e", test=lambda r: (r.mean("slow", START) >= 0, "so"))
    )
    assert held and numbers == "so"
    # What was not measured holds nothing.
    lost = replace(tiny_study(), expectations=(Expectation("e", ("fast", AFTER), ("slow", AFTER)),))
    one = [run for run in runs(lost, finished_study) if run.variant.name == "slow"]
    verdict = Results(lost, one, {}).verdicts[0]
    assert not verdict.held and "not measured" in verdict.numbers


def test_intervals_apart_need_two_intervals(tmp_path):
    """Two made-up evaluations, as far apart as can be, on the real boards."""

    def fake(name: str, won: int, boards: int = 128) -> Planned:
        directory = tmp_path / name / "seed_0"
        result = {
            "pass_rate": float(won),
            "passed": [str(won) * boards],
            "response_tokens": 5 + won,
        }
        write_json(directory / "evaluate" / "start.json", result)
        return Planned(Variant(name), 0, tiny_config(), directory)

    measures = (Measure("rate", "start"), Measure("long", "start", value="response_tokens"))
    study = tiny_study(
        variants=(Variant("all"), Variant("none")),
        measures=measures,
        baseline="none",
        paper={},
        plots=(),
        expectations=(
            Expectation("rates", ("all", "rate"), ("none", "rate"), apart=True),
            Expectation("lengths", ("all", "long"), ("none", "long")),
            Expectation("lengths apart", ("all", "long"), ("none", "long"), apart=True),
        ),
    )
    found = Results(study, [fake("all", 1), fake("none", 0)], {})
    assert [verdict.held for verdict in found.verdicts] == [True, True, False]
    cell = found.cells["all", "rate"]
    assert cell.to_baseline.mean == 1 and cell.to_baseline.low > 0.5
    assert "DID NOT HOLD" in found.text() and "held: all, rate 100.0%" in found.text()


def test_check_makes_the_exit_status_of_an_expectation(
    finished_study, tmp_path, capsys, one_device
):
    root = tmp_path / "study"
    shutil.copytree(finished_study, root)
    expects = {True: "mean >= 0", False: "mean < 0"}
    for holds, test in expects.items():
        file = _file(tmp_path / "tiny.py", "(Expectation('e', test=lambda r: _test(r)),)", test)
        flags = [f"--study={file}", f"--workdir={root}"]
        assert command.main(flags) == 0
        assert command.main([*flags, "--check"]) == (0 if holds else 1)
    assert "expected: e\n  DID NOT HOLD: it is" in capsys.readouterr().out


def _file(path: Path, expectations: str, test: str = "True") -> Path:
    """A study file that gives `tiny_study` with these expectations."""
    path.write_text(
        '"""A tiny study."""\n'
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from test_study import tiny_study\nfrom oel_jax.study.command import *\n"
        "PRESETS = ('nano', 'other')\n"
        "def _test(r):\n    mean = r.mean('slow', 'start')\n"
        f"    return {test}, f'it is {{mean}}'\n"
        f"def get_study(preset):\n    return tiny_study(expectations={expectations})\n"
    )
    return path


# --- bad input ------------------------------------------------------------------------------------

VARIANT = tiny_study().variants[0]
BAD = {
    "two variants have the name 'slow'": {"variants": (VARIANT, VARIANT)},
    "config.consolidate.learning_rat is not a field; did you mean": {
        "variants": (VARIANT, Variant("x", {"consolidate.learning_rat": 1.0}))
    },
    "variant x: config.loss.top_k is 0": {"variants": (VARIANT, Variant("x", {"loss.top_k": 0}))},
    "config.seed is set by the study": {"variants": (VARIANT, Variant("x", {"seed": 3}))},
    "'../x' is a name of a variant": {"variants": (VARIANT, Variant("../x"))},
    "'X' is a name": {"variants": (VARIANT, Variant("X"))},
    "'' is a name": {"variants": (VARIANT, Variant(""))},
    "variant 'gone' does not exist": {
        "variants": (VARIANT, Variant("x", {"extract.knowledge_from": Other("gone")}))
    },
    "variants wait for each other: a -> b -> a": {
        "variants": (
            VARIANT,
            Variant("a", {"extract.knowledge_from": Other("b")}),
            Variant("b", {"extract.knowledge_from": Other("a")}),
        )
    },
    "knowledge_from": {"variants": (VARIANT, Variant("x", {"extract.knowledge_from": "nowhere"}))},
    "no model directory nowhere": {
        "variants": (VARIANT, Variant("x", {"extract.model_path": "nowhere"}))
    },
    "no model directory there": {"variants": (VARIANT, Variant("x", {"model.path": "there"}))},
    "stages are \\('play',\\)": {"variants": (VARIANT, Variant("x", stages=("play",)))},
    "baseline: variant 'x' does not exist": {"baseline": "x"},
    "two measures have the name 'start'": {"measures": MEASURES[:1] * 2},
    "no variant has a round 7": {"measures": (*MEASURES, Measure("late", "consolidated", 7))},
    "measure 'm': give an evaluation": {"measures": (*MEASURES, Measure("m", "consolidated"))},
    "expectation 'e': measure 'x' does not exist": {
        "expectations": (Expectation("e", ("slow", "x"), ("slow", START)),)
    },
    "either higher and lower, or test": {"expectations": (Expectation("e", ("slow", START)),)},
    "seeds are": {"seeds": (1, 1)},
    "paper: variant 'x' does not exist": {"paper": {("x", START): 0.5}},
    "plot p: measure 'x' does not exist": {"plots": (Plot("p", "p", ("x",)),)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_studies_are_refused_at_start(message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "run", None)  # nothing is run
    parts = {"baseline": "", "paper": {}, "expectations": (), "plots": ()} | BAD[message]
    study = tiny_study(**parts)
    module = _file(tmp_path / "tiny.py", "()")
    with pytest.raises(UserError, match=message), monkeypatch.context() as patch:
        patch.setattr("test_study.tiny_study", lambda **_: study, raising=False)
        run_study(load(str(module)), tmp_path / "study")
    assert not list((tmp_path / "study").rglob("seed_*"))


def test_what_the_command_refuses(finished_study, tmp_path, capsys, one_device):
    root = tmp_path / "study"
    shutil.copytree(finished_study, root)
    before = contents(root, "**/*.json")
    file = _file(tmp_path / "tiny.py", "()")
    other = _file(tmp_path / "other.py", "()")
    plain = tmp_path / "plain.py"
    plain.write_text("x = 1\n")
    full = tmp_path / "full"
    go(full, tiny_config(), ["deploy"])
    cases = {
        ("--study=gone.py", f"--workdir={root}"): "there is no such Python file",
        (f"--study={plain}", f"--workdir={root}"): "a docstring, a tuple PRESETS",
        (f"--study={file}:big", f"--workdir={root}"): "preset 'big' is not one of nano, other",
        (f"--study={other}", f"--workdir={root}"): "holds the study tiny:nano, not other:nano",
        (f"--study={file}:other", f"--workdir={root}"): "holds the study tiny:nano",
        (f"--study={file}", f"--workdir={full}"): "is not empty and holds no study",
        (f"--study={file}", f"--workdir={root}", "--seeds=a"): "give integers",
        (f"--study={file}", f"--workdir={root}", "--sneeds=1"): "is no flag",
        (f"--study={file}", f"--workdir={root}", "--config.loss.topk=1"): "did you mean",
        (f"--study={file}", f"--workdir={root}", "--config.loss.top_k=4"): "another config",
    }
    for flags, message in cases.items():
        assert command.main(flags) == 2, flags
        assert message in capsys.readouterr().err
    assert contents(root, "**/*.json") == before
    with command._owned(root, tiny_study(), runs(tiny_study(), root)):
        assert command.main([f"--study={file}", f"--workdir={root}"]) == 2
        assert "in use by process" in capsys.readouterr().err


def test_fields_of_all_variants_are_set_on_the_command_line(tmp_path):
    file = _file(tmp_path / "tiny.py", "()")
    given = ["--config.rounds=2", "--config.model.path=nano:tiny", "--config.evaluate.curve=(1,2)"]
    study = load(str(file), [4, 5], read_overrides(given))
    for one in runs(study, tmp_path):
        assert (one.config.rounds, one.config.model.path) == (2, "nano:tiny")
        assert one.config.evaluate.curve == (1, 2) and one.seed == one.config.seed
    assert [one.seed for one in runs(study, tmp_path)] == [4, 4, 5, 5]


def test_the_study_page_stands_alone_and_takes_text_for_text(finished_study, tmp_path, capsys):
    page = (finished_study / "report.html").read_text(encoding="utf-8")
    results = read_json(finished_study / "results.json")
    for cell in results["cells"]:
        assert cell["variant"] in page and cell["measure"] in page
    assert page.count("<img ") == len(list((finished_study / "plots").glob("*.png"))) > 0
    assert 'src="data:image/png;base64,' in page and "http" not in page.replace("http-equiv", "")
    for verdict in results["expectations"]:
        assert escape(verdict["name"]) in page
    hostile = "<script>alert(1)</script>"
    results["about"] = results["cells"][0]["variant"] = hostile
    results["expectations"] = [{"name": hostile, "held": False, "numbers": hostile}]
    results["failed"] = {hostile: hostile}
    write_json(tmp_path / "study.json", {})
    assert report.main([f"--workdir={tmp_path}"]) == 2
    assert "no results.json yet" in capsys.readouterr().err
    write_json(tmp_path / "results.json", results)
    assert report.main([f"--workdir={tmp_path}"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert hostile not in page and page.count(escape(hostile)) == 6
    del results["cells"]
    write_json(tmp_path / "results.json", results)
    assert report.main([f"--workdir={tmp_path}"]) == 2
    assert "results.json is damaged" in capsys.readouterr().err


# --- the shipped studies --------------------------------------------------------------------------


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_load_and_validate_for_every_preset(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load(str(file))
    assert study.preset == "nano" and len(study.about.splitlines()) > 2
    assert "Expected" in study.about and "Run time" in study.about
    names = load_module(file).PRESETS
    assert len(names) > 1 and "nano" in names
    for preset in names:
        study = load(f"{file}:{preset}")
        planned = runs(study, Path("runs"))
        wanted = [variant.seeds or len(study.seeds) for variant in study.variants]
        assert len(planned) == sum(wanted)
        nano = [one.config.model.path.startswith("nano") for one in planned]
        assert all(nano) if preset == "nano" else not any(nano)
        assert study.plots and all(abs(number) <= 1 for number in study.paper.values())


def test_the_shelf_of_another_version_is_only_lost_work(tmp_path):
    write_json(tmp_path / "shelf.json", {"schema": "oel.shelf/0", "entries": {"a": 1}})
    assert Shelf(tmp_path)._entries == {}
