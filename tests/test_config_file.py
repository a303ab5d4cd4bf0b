"""Config files of a user's: what is wrong in one is said with its own lines alone."""

import pytest
from tiny_run import NANO_CONFIG

import oel_jax
from oel_jax.config_file import load_config
from oel_jax.errors import UserError
from oel_jax.main import _FLAGS, _parse
from oel_jax.plan import main as plan
from oel_jax.study import main as study

START = "from oel_jax.config import default\ndef get_config(preset=None):\n    c = default()\n"
WRONG = {
    START + "    c.rounds = foo\n    return c\n": (
        "raised NameError: name 'foo' is not defined",
        "line 4, in get_config\n    c.rounds = foo",
    ),
    START + "    c.rounds = int('x')\n    return c\n": (
        "raised ValueError: invalid literal",
        "line 4, in get_config\n    c.rounds = int('x')",
    ),
    START + "    c.loss.topk = 3\n    return c\n": ("raised ", "line 4, in get_config"),
    "def get_config(:\n": ("raised SyntaxError: invalid syntax", "line 1\n    def get_config(:"),
    "import no_such_module\n": (
        "raised ModuleNotFoundError: No module named 'no_such_module'",
        "line 1, in <module>\n    import no_such_module",
    ),
    "x = 1\n": ("is no config file: it has no function get_config", ""),
    START: ("get_config returned nothing; it must return a ConfigDict", ""),
    "def get_config(preset=None):\n    return {}\n": ("get_config returned a dict", ""),
    "from oel_jax.errors import UserError\ndef get_config(preset=None):\n"
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

    def said(command, *arguments):
        with pytest.raises(SystemExit) as ended:
            raise SystemExit(command(*arguments))
        errors = capsys.readouterr().err
        assert ended.value.code == 2 and errors.startswith("error: ")
        return errors.removeprefix("error: ").rstrip("\n")

    assert said(plan, [f"--config={file}", "--target=cpu:8"]) == str(caught.value)
    for flags in ([], ["--config.rounds=2"]):  # a field is changed in what the file returned
        if text != "def get_config(preset=None):\n    return {}\n":
            assert said(_parse, ["main", f"--config={file}", "--workdir=W", *flags]) == str(
                caught.value
            )
        _FLAGS.unparse_flags()
    if "my own words" not in text:
        assert str(file) in said(study, [f"--study={file}", f"--workdir={tmp_path / 'W'}"])


def test_a_config_is_loaded_from_python_by_text_or_path():
    for file in (str(NANO_CONFIG), NANO_CONFIG):
        assert oel_jax.load_config(file).extract.n == 6
    assert oel_jax.load_config(f"{NANO_CONFIG}:paper").loss.temperature == 1.0
    assert oel_jax.load_config(NANO_CONFIG, "paper").preset == "paper"
    for wrong in ("no/such.py", "README.md", "configs"):
        with pytest.raises(UserError, match="there is no such Python file; try one of configs/"):
            oel_jax.load_config(wrong)
