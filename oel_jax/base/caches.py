"""Where caches are kept: below the home directory, or where that cannot be, in a temporary one.

In containers a user may have no name and no home, or a home that cannot be written. Imports no JAX.
"""

import os
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path

from oel_jax.base.errors import UserError


def compiled_programs() -> Path:
    """Directory of XLA's compiled programs (`config.compilation_cache=''`).

    Raises:
      UserError: no directory can be written.
    """
    home = _home()
    usual = home and home / ".cache" / "oel_jax" / "xla"
    if usual and can_be_written(usual):
        return usual
    return _instead("compiled programs", "config.compilation_cache") / "xla"


@cache
def set_hugging_face_home() -> None:
    """See to it that the hub client (and `datasets`) can write its cache; call before importing it.

    Without a home directory it would make one that is named "~" below the current one. Variables
    that the user has set are left alone, and so is a cache that holds models but cannot be written.

    Raises:
      UserError: no directory can be written.
    """
    if {"HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"} & os.environ.keys():
        return
    given, home = os.environ.get("XDG_CACHE_HOME"), _home()
    base = Path(given) if given else home and home / ".cache"
    if base and can_be_written(base / "huggingface"):
        return
    if base and any((base / "huggingface" / "hub").glob("models--*")):
        return
    os.environ["HF_HOME"] = str(_instead("models of the hub", "HF_HOME") / "huggingface")


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # HOME is not set, and the user has no entry in /etc/passwd
        return None


def can_be_written(directory: Path) -> bool:
    """Whether a file can be made in a directory, which is made too if need be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell (root, read-only mounts, full disks).
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def _instead(what: str, setting: str) -> Path:
    """A private temporary directory, with a note that says so."""
    try:
        place = _private()
    except OSError as error:
        raise UserError(
            f"no directory for {what} can be written: neither below the home directory nor a "
            f"temporary one ({error.strerror or error}); set {setting} to one that can"
        ) from error
    note = f"note: the home directory cannot be written; {what} are kept in {place}"
    print(f"{note} until it is emptied (set {setting} to another place)", file=sys.stderr)
    return place


def _private() -> Path:
    """The same directory for all processes of a user, which nobody else can write.

    Compiled programs are run as they are, so another user must not be able to put some there.
    """
    place = Path(tempfile.gettempdir()) / f"oel_jax_cache_{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    if (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and not found.st_mode & 0o022
        and can_be_written(place)
    ):
        return place
    return Path(tempfile.mkdtemp(prefix="oel_jax_cache_"))
