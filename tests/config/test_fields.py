"""The table of fields: the docs page, the command line, values of older versions, old workdirs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from oel_jax.base.errors import UserError
from oel_jax.base.files import write_json
from oel_jax.config import as_json, default, load_config, validate, with_fields
from oel_jax.config.command_line import read_overrides, split_overrides
from oel_jax.config.fields import FIELDS, is_free, leaves
from oel_jax.config.old_values import saved_config
from oel_jax.config.page import config_text, page
from oel_jax.runs.workdir import Workdir

ROOT = Path(__file__).resolve().parents[2]

# What a value was in an older version, and what it is now.
OLD = {
    "compilation_cache": ("", None),
    "profile": ("", None),
    "game.module": ("", None),
    "sampler.max_len": (0, None),
    "extract.max_prompt": (0, None),
    "extract.template_file": ("", None),
    "extract.model_path": ("", None),
    "extract.knowledge_from": ("", None),
    "consolidate.save_minutes": (0.0, None),
    "consolidate.teacher_dtype": ("", None),
    "consolidate.offload": ("none", ()),
    "lora.targets": ("q,k,v", ("q", "k", "v")),
    "guard.response_tokens": ((), None),
    "guard.entropy": ((), None),
    "guard.skill_drop": (0.0, None),
    "loss.divergence": ("", None),
    "loss.support": ("", None),
}


def test_the_docs_page_is_made_from_the_table():
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == page(), "run: python -m oel_jax.config > docs/configuration.md"
    assert all(f"| `{path}` |" in committed for path in FIELDS)


def test_what_may_change_in_an_old_workdir():
    """What defines a run may not; its length, its devices and what is printed may."""
    assert all(map(is_free, ("rounds", "mesh.fsdp", "sampler.slots", "log.tensorboard")))
    assert not any(map(is_free, ("seed", "game.name", "loss.top_k", "no_such.field", "preset")))
    assert is_free("log.of_an_older_version") and not is_free("sampler.of_an_older_version")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config.rounds=5"], {"rounds": 5}),
        (["--config.rounds", "5", "--config.seed=1"], {"rounds": 5, "seed": 1}),
        (["-config.rounds=5"], {"rounds": 5}),
        (["--config.extract.previous"], {"extract.previous": True}),
        (["--noconfig.extract.previous"], {"extract.previous": False}),
        (["--config.extract.previous=False"], {"extract.previous": False}),
        (["--config.loss.temperature=1"], {"loss.temperature": 1.0}),
        (["--config.model.path=123"], {"model.path": "123"}),
        (["--config.model.path=a=b"], {"model.path": "a=b"}),
        (["--config.extract.max_prompt=none"], {"extract.max_prompt": None}),
        (["--config.extract.max_prompt=None"], {"extract.max_prompt": None}),
        (["--config.extract.max_prompt=7"], {"extract.max_prompt": 7}),
        (["--config.loss.support=none"], {"loss.support": None}),
        (["--config.loss.correction=none"], {"loss.correction": "none"}),
        (["--config.mesh.fsdp=auto"], {"mesh.fsdp": "auto"}),
        (["--config.mesh.fsdp=-1"], {"mesh.fsdp": -1}),
        (["--config.evaluate.curve=1,5"], {"evaluate.curve": (1, 5)}),
        (["--config.evaluate.curve=(1, 5)"], {"evaluate.curve": (1, 5)}),
        (["--config.evaluate.curve=5"], {"evaluate.curve": (5,)}),
        (["--config.evaluate.curve=()"], {"evaluate.curve": ()}),
        (["--config.guard.entropy=0.5,2"], {"guard.entropy": (0.5, 2)}),
        (["--config.guard.entropy=none"], {"guard.entropy": None}),
        (["--config.lora.targets=q,v"], {"lora.targets": ("q", "v")}),
        (["--config.lora.targets=('q', 'v')"], {"lora.targets": ("q", "v")}),
        (["--config.lora.targets=q"], {"lora.targets": ("q",)}),
        (["--config.consolidate.offload=none"], {"consolidate.offload": ()}),
        (["--config.consolidate.offload=optimizer"], {"consolidate.offload": ("optimizer",)}),
    ],
)
def test_a_command_line_is_read_by_the_kind_of_each_field(arguments, expected):
    changes = read_overrides(arguments)
    assert changes == expected
    assert [type(v) for v in changes.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.rounds"], "config.rounds needs a value"),
        (["--config.rounds=2.5"], r"config.rounds is '2.5'; it must be an integer"),
        (["--config.rounds=none"], r"config.rounds is 'none'; it must be an integer"),
        (["--config.extract.previous=maybe"], "is 'maybe'; it must be True or False"),
        (["--noconfig.rounds"], "--noconfig.rounds: write --config.rounds=VALUE"),
        (["--config.round=2"], r"config.round is not a field; did you mean config.rounds\?"),
        (["--seed=2"], "'--seed=2' is no flag; config fields are set by --config.FIELD=VALUE"),
    ],
)
def test_a_command_line_that_cannot_be_read(arguments, message):
    with pytest.raises(UserError, match=message):
        read_overrides(arguments)


def test_overrides_are_taken_out_of_a_command_line():
    arguments = ["--config=F.py:paper", "--config.rounds", "3", "--workdir", "W", "--config.seed=1"]
    overrides, rest = split_overrides(arguments)
    assert overrides == ["--config.rounds=3", "--config.seed=1"]
    assert rest == ["--config=F.py:paper", "--workdir", "W"]


@pytest.mark.parametrize("path", FIELDS)
def test_every_default_can_be_written_on_a_command_line(path):
    value = FIELDS[path].default
    assert read_overrides([f"--config.{path}={value}"]) == {path: value}


def test_every_field_with_an_old_value_is_tried():
    assert OLD.keys() == {path for path, field in FIELDS.items() if field.convert}


def test_old_values_of_a_config_file_are_converted_with_one_note(tmp_path):
    lines = [f"    c.{path} = {old!r}\n" for path, (old, _) in OLD.items()]
    file = tmp_path / "mine.py"
    file.write_text(
        "from oel_jax.config import defaults as oel_config\n\n"  # as older config files begin
        "def get_config(preset=None):\n    c = oel_config.default()\n"
        f"{''.join(lines)}    return c\n"
    )
    config = load_config(file)
    (note,) = validate(config)
    assert note.startswith("values of an older version were converted: ")
    assert all(f"config.{path}={old!r} is now {now!r}" in note for path, (old, now) in OLD.items())
    expected = leaves(default().to_dict()) | {path: now for path, (_, now) in OLD.items()}
    assert leaves(config.to_dict()) == expected
    assert validate(config) == []


@pytest.mark.parametrize("path", OLD)
def test_old_values_on_the_command_line(path):
    old, now = OLD[path]
    config = with_fields(default(), read_overrides([f"--config.{path}={old}"]))
    validate(config)
    assert leaves(config.to_dict())[path] == now


def test_an_old_workdir_is_resumed_with_the_same_config(tmp_path):
    config = default()
    old = as_json(config)
    for path, (before, now) in OLD.items():
        group, _, name = path.rpartition(".")
        (old[group] if group else old)[name] = list(before) if before == () else before
        config = with_fields(config, {path: now})
    Workdir(tmp_path).open(as_json(config)).close()
    write_json(tmp_path / "config.json", old)  # as an older version left it
    assert saved_config(tmp_path / "config.json") == as_json(config)
    Workdir(tmp_path).open(as_json(config)).close()
    assert json.loads((tmp_path / "manifest.json").read_text())["config_changes"] == []
    with pytest.raises(UserError, match=r"config\.extract\.max_prompt: None -> 900"):
        Workdir(tmp_path).open(as_json(with_fields(config, {"extract.max_prompt": 900})))


@pytest.mark.parametrize("text", ["[1]", "{", "3"])
def test_a_stored_config_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not"):
        saved_config(tmp_path / "config.json")


def test_references_from_field_to_field_follow_an_override():
    config = default()
    config.extract.n_run = config.extract.get_ref("n")
    assert with_fields(config, {"extract.n": 7}).extract.n_run == 7
    assert config.extract.n_run == 25


def test_the_whole_config_is_shown_and_what_differs_is_marked():
    config = with_fields(default(), {"rounds": 5, "evaluate.curve": [1, 2], "evaluate.steps": []})
    lines = config_text(config).splitlines()
    marked = [line for line in lines if line.startswith("*")]
    assert [line.split()[1] for line in marked] == ["rounds", "evaluate.curve"]
    assert marked[0].endswith("= 5  (default 2)")
    shown = [line[2:].split()[0] for line in lines if " = " in line]
    assert sorted(shown) == sorted(FIELDS)
    assert lines[-1] == f"2 of {len(FIELDS)} fields differ from their default (*)"


def test_print_config_loads_no_model_and_makes_no_workdir(tmp_path):
    code = (
        "import sys; from absl import app; from oel_jax import main\n"
        "try:\n    app.run(main.main, flags_parser=main._parse)\n"
        "finally:\n    print('jax' in sys.modules, file=sys.stderr)"
    )
    flags = [f"--config={ROOT / 'configs/nano_frozen_lake.py'}", "--print_config"]
    more = ["--config.seed=7", "--config.model.path=no/such/model"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, *more],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "* seed " in done.stdout and "'no/such/model'" in done.stdout
    assert done.stderr.strip() == "False" and not list(tmp_path.iterdir())
