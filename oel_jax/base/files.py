"""Files that are replaced at once or not at all, and JSON. Imports no JAX."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from oel_jax.base.errors import UserError


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically: temporary file next to it, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # mkstemp makes it private
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically by `value` as indented JSON (NaN and infinity are refused)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode("utf-8") + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; UserError naming it if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # bad JSON or bad UTF-8
        raise UserError(f"{path} is not valid JSON ({error}); restore or delete it") from error


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; `UserError` naming the file if it is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {path}: {reason}; is it a model directory?") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
