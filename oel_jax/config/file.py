"""Config files: a Python file with `get_config(preset=None)`, which returns a `ConfigDict`.

    config = load_config("configs/nano_frozen_lake.py")          # or "FILE.py:paper"

Whatever goes wrong inside a user's file becomes one message that ends with the file's own lines.
Imports no JAX.
"""

import importlib.util
import re
import traceback
from pathlib import Path
from types import ModuleType

import ml_collections

from oel_jax.base.errors import UserError


def load_config(file: str | Path, preset: str | None = None) -> ml_collections.ConfigDict:
    """What the config file's `get_config` returns; not checked yet (see `validate`).

    Args:
      file: a path, or as on the command line 'FILE.py:PRESET' or 'NAME:PRESET' (`existing`).
      preset: passed on to `get_config`, if there is one.

    Raises:
      UserError: there is no such file, it has no get_config, or an error is raised in it.
    """
    path, given = existing(str(file))
    preset = preset or given
    try:
        module = load_module(Path(path))
        return check_config(path, module.get_config(*([preset] if preset else [])))
    except Exception as error:
        raise explain(path, error) from None


def existing(text: str, flag: str = "--config", folder: str = "") -> tuple[str, str]:
    """'FILE.py:PRESET' or 'NAME:PRESET' -> (file, preset or '').

    A name is that of a file in configs/, or in a folder there, e.g. 'nano_frozen_lake'.

    Raises:
      UserError: there is no such Python file.
    """
    path, _, preset = (text, "", "") if text.endswith(".py") else text.partition(":")
    if re.fullmatch(r"[A-Za-z0-9_]+", path):
        return str(_named(path, flag, folder)), preset
    if not path.endswith(".py") or not Path(path).is_file():
        places = "/".join(filter(None, ("configs", folder, "*.py")))
        raise UserError(f"{flag}={path}: there is no such Python file; try one of {places}")
    return path, preset


def _named(name: str, flag: str, folder: str) -> Path:
    """The file of a config or study by its name, in the installed package or in a clone."""
    package = Path(__file__).resolve().parents[1]
    places = [package / "configs" / folder, package.parent / "configs" / folder]
    for place in places:
        if (place / f"{name}.py").is_file():
            return place / f"{name}.py"
    known = sorted({file.stem for place in places for file in place.glob("[a-z]*.py")})
    raise UserError(
        f"{flag}={name}: there is none of this name; give a Python file, or one of "
        f"{', '.join(known)}"
    )


def load_module(file: Path) -> ModuleType:
    """Run a Python file of the user's as a module that is not kept."""
    spec = importlib.util.spec_from_file_location(f"oel_jax_file_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_config(file: str, config: object) -> ml_collections.ConfigDict:
    """The config that a file returned; UserError if it is something else."""
    if not isinstance(config, ml_collections.ConfigDict):
        raise _not_a_config(file, config)
    return config


def _not_a_config(file: str | Path, config: object) -> UserError:
    returned = "nothing" if config is None else f"a {type(config).__name__}"
    return UserError(
        f"{file}: get_config returned {returned}; it must return a ConfigDict: start from "
        "oel_jax.config.default(), change fields, and `return` it"
    )


def explain(file: str | Path, error: BaseException) -> UserError:
    """The message for an error that was raised while a user's Python file ran.

    An error that is one of ours keeps its words. Others are named, with the lines of the file that
    led to them: libraries' own frames tell a user nothing.
    """
    wanted, chain = Path(file).resolve(), _chain(error)
    for one in chain:
        if isinstance(one, UserError):
            return one
    for one in chain:
        lines = [frame for frame in traceback.extract_tb(one.__traceback__) if _same(frame, wanted)]
        broken = isinstance(one, SyntaxError) and one.filename and one.lineno
        if broken and Path(one.filename).resolve() == wanted:
            place = f'  File "{file}", line {one.lineno}\n    {(one.text or "").strip()}'
        elif lines:
            place = "\n".join(
                f'  File "{file}", line {frame.lineno}, in {frame.name}\n    {frame.line}'
                for frame in lines
            )
        else:
            continue
        what = one.msg if isinstance(one, SyntaxError) else _words(one)
        return UserError(f"{file} raised {type(one).__name__}: {what}\n{place}")
    if "<class 'NoneType'>" in str(error):  # fields were to be changed in what was returned
        return _not_a_config(file, None)
    if "has no attribute 'get_config'" in str(error):
        return UserError(f"{file} is no config file: it has no function get_config; see configs/")
    return UserError(f"{file}: {type(error).__name__}: {_words(error)}")


def _chain(error: BaseException) -> list[BaseException]:
    """The error and those it came from, the first cause first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.insert(0, error)
        error = error.__cause__ or error.__context__
    return found


def _same(frame: traceback.FrameSummary, file: Path) -> bool:
    return Path(frame.filename).resolve() == file


def _words(error: BaseException) -> str:
    text = str(error).strip()
    if text[:1] in ("'", '"') and text[:1] == text[-1:]:  # of a KeyError
        text = text[1:-1]
    return text.replace("\\'", "'").replace("\\n", ". ").replace("\n", ". ")
