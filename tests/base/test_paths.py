"""A URL where a path is meant is refused by every field and flag; a colon alone makes no URL."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_run import tiny_config

from oel_jax import load_model
from oel_jax.base import caches, paths
from oel_jax.base.errors import UserError
from oel_jax.config.checks import validate
from oel_jax.config.fields import FIELDS as CONFIG_FIELDS
from oel_jax.config.rules import BUCKETS
from oel_jax.runs.compilation import keep_compiled
from oel_jax.runs.workdir import Workdir

ROOT = Path(__file__).resolve().parents[2]
URLS = ["gs://b/x", "gs:/b/x", "s3://b/x", "S3://b", "hf://o/n", "file:///tmp/x", "https://a.b/c"]
PATHS = ["runs/a:b", "./gs:/x", "/tmp/10:30/x", "a:b/c", "nano:tiny", "x y", "größe", "c:/x", "gs"]

# Every config field that is a path; `test_no_field_is_forgotten` keeps the list whole.
FIELDS = {
    "model.path": (),
    "extract.model_path": (),
    "extract.knowledge_from": (),
    "extract.template_file": (),
    "game.module": (),
    "evaluate.text_file": (),
    "compilation_cache": ("gs://b/x", "s3://b/x", "S3://b"),  # JAX itself can use these
}


@pytest.mark.parametrize("text", URLS)
def test_urls(text, tmp_path):
    assert paths.scheme(text) == paths.scheme(Path(text)) == text.partition(":")[0].lower()
    with pytest.raises(UserError, match="--out is .*; it must be a path"):
        paths.local(text, "--out")
    for use in (Workdir, load_model):
        with pytest.raises(UserError, match="not a URL"):
            use(text)


@pytest.mark.parametrize("text", PATHS)
def test_texts_with_a_colon_are_paths(text):
    assert paths.wrong(text) is None
    assert paths.local(text, "x") == paths.argument(text) == Path(text)


def test_advice_says_what_to_give_instead():
    assert "as in /a/b" in paths.wrong("file:///a/b")
    assert "owner/name" in paths.wrong("https://huggingface.co/Qwen/Qwen3-4B")
    assert "mount" in paths.wrong("gs://bucket/x")
    assert "empty" in paths.wrong(" ")


def test_home_is_filled_in(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert paths.local("~/runs", "x") == Path("/home/someone/runs")
    assert Workdir("~/runs").root == Path("/home/someone/runs")
    assert paths.local("~x/runs~", "x") == Path("~x/runs~")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("text", URLS)
def test_config_fields(field, text):
    must = CONFIG_FIELDS[field].rule(text)
    assert must is None if text in FIELDS[field] else "not a URL" in must
    if must and field != "compilation_cache":
        config = tiny_config(**{field.replace(".", "__"): text})
        with pytest.raises(UserError, match=f"config.{field} is '{text}'; it must be a path"):
            validate(config)


def test_no_field_is_forgotten():
    """Fields of free text are those that take any text: each is a path or known to be none."""
    free = {path for path, field in CONFIG_FIELDS.items() if field.rule("some/text") is None}
    assert free - {"game.name", "extract.item_marker", "logs.leave_out"} == FIELDS.keys()


# --- commands -------------------------------------------------------------------------------------

COMMANDS = {  # module -> (further flags it needs, its flags that are paths)
    "oel_jax.study.command": (["--study=configs/studies/table1.py"], ["--workdir"]),
    "oel_jax.report.page": ([], ["--workdir"]),
    "oel_jax.export.command": (["--round=1"], ["--workdir", "--out"]),
    "oel_jax.plan.command": (["--config=configs/nano_frozen_lake.py", "--target=cpu:1"], ["--out"]),
    "oel_jax.evaluate.command": (
        ["--lm_eval_tasks=ifeval"],
        ["--workdir", "--ifeval_data", "--lm_eval_include"],
    ),
    "oel_jax.nano.pretrain": ([], ["--out"]),
    "oel_jax.nano.card": ([], ["--model", "--out"]),
}


@pytest.mark.parametrize("module", COMMANDS)
def test_flags(module, capsys, monkeypatch):
    needed, flags = COMMANDS[module]
    command = importlib.import_module(module).main
    for flag in flags:
        monkeypatch.setattr(sys, "argv", [module, *needed, f"{flag}=gs://bucket/x"])
        with pytest.raises(SystemExit) as ended:
            command()
        assert ended.value.code == 2
        assert f"argument {flag}: 'gs://bucket/x' must be a path" in capsys.readouterr().err


def test_no_flag_makes_a_path_unchecked():
    """`type=Path` is nowhere, so that each flag that takes a path is checked."""
    found = []
    for file in [*(ROOT / "oel_jax").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "type":
                if isinstance(node.value, ast.Name) and node.value.id == "Path":
                    found.append(f"{file}:{node.value.lineno}")
    assert not found


def test_main_refuses_a_workdir_in_a_bucket(tmp_path):
    config = ROOT / "configs" / "nano_frozen_lake.py"
    done = subprocess.run(
        [sys.executable, "-m", "oel_jax.main", f"--config={config}", "--workdir=gs://bucket/run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "error: --workdir is 'gs://bucket/run'; it must be a path" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


# --- caches ---------------------------------------------------------------------------------------


@pytest.fixture
def cache_setting():
    """JAX's setting, put back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("url", ["gs://bucket/xla", "s3://bucket//odd/", "az://c/x"])
def test_a_bucket_for_compiled_programs_reaches_jax_unchanged(url, cache_setting, monkeypatch):
    assert CONFIG_FIELDS["compilation_cache"].rule(url) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    keep_compiled(url)
    assert cache_setting() == url


@pytest.mark.parametrize("kind", BUCKETS)
def test_a_bucket_without_its_package(kind, cache_setting, monkeypatch):
    before = cache_setting()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "etils" or None)
    with pytest.raises(UserError, match=f"config.compilation_cache is .* package {BUCKETS[kind]}"):
        keep_compiled(f"{kind}://bucket/x")
    assert cache_setting() == before


def test_a_local_directory_for_compiled_programs(cache_setting, tmp_path):
    keep_compiled(str(tmp_path / "a:b"))
    assert cache_setting() == str(tmp_path / "a:b")


def places(tmp_path: Path, **environment) -> tuple[str, str, str]:
    """(compiled programs, hub, notes) of a new process; a value None unsets a variable."""
    script = (
        "from oel_jax.base import caches; print(caches.compiled_programs()); "
        "caches.set_hugging_face_home(); import huggingface_hub.constants as c; "
        "print(c.HF_HUB_CACHE)"
    )
    hf = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    given = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)} | environment
    given = {k: v for k, v in given.items() if v is not None and (k in environment or k not in hf)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return (*done.stdout.splitlines(), done.stderr)


def test_caches_are_below_the_home_directory(tmp_path):
    (tmp_path / "home").mkdir()
    xla, models, notes = places(tmp_path, HOME=str(tmp_path / "home"))
    assert xla == str(tmp_path / "home" / ".cache" / "oel_jax" / "xla")
    assert models == str(tmp_path / "home" / ".cache" / "huggingface" / "hub")
    assert not notes


def test_a_home_that_cannot_be_written(tmp_path):
    private = tmp_path / f"oel_jax_cache_{os.getuid()}"
    xla, models, notes = places(tmp_path, HOME="/dev/null/home")
    assert (xla, models) == (str(private / "xla"), str(private / "huggingface" / "hub"))
    assert notes.count("note: the home directory cannot be written") == 2
    assert private.stat().st_mode & 0o777 == 0o700
    # what the user has set is left alone
    set_by_user = places(tmp_path, HOME="/dev/null/home", HF_HOME=str(tmp_path / "mine"))[1]
    assert set_by_user == str(tmp_path / "mine" / "hub")


def test_a_directory_that_others_can_write_is_not_used(tmp_path):
    """Compiled programs are run as they are found."""
    place = tmp_path / f"oel_jax_cache_{os.getuid()}"
    place.mkdir()
    place.chmod(0o777)
    xla = Path(places(tmp_path, HOME="/dev/null/home")[0])
    assert xla.parent != place and xla.parent.parent == tmp_path
    assert xla.parent.stat().st_mode & 0o777 == 0o700


def test_a_user_without_a_name(monkeypatch, tmp_path, capsys):
    """No HOME and no entry in /etc/passwd: `Path.home` raises, `~` stays."""
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert caches.compiled_programs() == tmp_path / f"oel_jax_cache_{os.getuid()}" / "xla"
    assert "note: the home directory" in capsys.readouterr().err
    with pytest.raises(UserError, match="without ~"):
        paths.local("~/runs", "--workdir")
