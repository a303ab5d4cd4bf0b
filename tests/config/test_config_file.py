"""Config files of a user's: what is wrong in one is said with its own lines alone."""

import subprocess
import sys

import pytest
from tiers import HANG
from tiny_run import NANO_CONFIG

import oel_jax
from oel_jax.base.errors import UserError
from oel_jax.config.file import load_config
from oel_jax.plan.command import main as plan
from oel_jax.study.command import main as study

START = (
    "from oel_jax.config.defaults import default\ndef get_config(preset=None):\n    c = default()\n"
)
WRONG = {
    START + "    c.rounds = foo\n    return c\n": (
        "raised NameError: name 'foo' is not defined",
        "line 4, in get_config\n    c.rounds = foo",
    ),
    START + "    c.rounds = int('x')\n    return c\n": (
        "raised ValueError: invalid literal",
        "line 4, in get_config\n    c.rounds = int('x')",
    ),
    START + "    c.lossy.top_k = 3\n    return c\n": (
        "raised AttributeError: ",
        "line 4, in get_config\n    c.lossy.top_k = 3",
    ),
    "def get_config(:\n": ("raised SyntaxError: invalid syntax", "line 1\n    def get_config(:"),
    "import no_such_module\n": (
        "raised ModuleNotFoundError: No module named 'no_such_module'",
        "line 1, in <module>\n    import no_such_module",
    ),
    "x = 1\n": ("is no config file: it has no function get_config", ""),
    START: ("get_config returned nothing; it must return a ConfigDict", ""),
    "def get_config(preset=None):\n    return {}\n": ("get_config returned a dict", ""),
    "from oel_jax.base.errors import UserError\ndef get_config(preset=None):\n"
    "    raise UserError('my own words')\n": ("my own words", ""),
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_one_message_everywhere(tmp_path, text, capsys):
    file = tmp_path / "mine.py"
    file.write_text(text)
    words, lines = WRONG[text]
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert words in str(caught.value) and str(caught.value).endswith(lines)
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None
    assert str(caught.value).count("File ") <= 1  # no frames but the file's

    message = str(caught.value)
    assert plan([f"--config={file}", "--target=cpu:8"]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    # A separate process, since absl's flags keep what they were given; with a changed field,
    # which is set in what the file returned.
    flags = [f"--config={file}", f"--workdir={tmp_path / 'W'}", "--config.rounds=2"]
    command = [sys.executable, "-m", "oel_jax.main", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stdout) == (2, "")
    if "return {}" not in text:  # ml_collections then finds another thing to complain of first
        assert done.stderr == f"error: {message}\n"
    assert done.stderr.startswith(f"error: {file}") or done.stderr == f"error: {message}\n"
    assert study([f"--study={file}", f"--workdir={tmp_path / 'W'}"]) == 2
    assert "Traceback" not in capsys.readouterr().err + done.stderr


def test_a_config_is_loaded_from_python_by_text_or_path():
    for file in (str(NANO_CONFIG), NANO_CONFIG):
        assert oel_jax.load_config(file).extract.n == 6
    assert oel_jax.load_config(f"{NANO_CONFIG}:paper").loss.temperature == 1.0
    assert oel_jax.load_config(NANO_CONFIG, "paper").preset == "paper"
    for wrong in ("no/such.py", "README.md", "./configs"):
        with pytest.raises(UserError, match="there is no such Python file; try one of configs/"):
            oel_jax.load_config(wrong)
