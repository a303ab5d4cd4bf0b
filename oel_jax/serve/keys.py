"""Keys of clients and of the administrator, compared in constant time."""

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from oel_jax.base.errors import UserError

_SHORTEST = 8  # characters of a key


class Keys:
    """Some keys, any of which opens; without one nothing does.

    Only digests are kept. All of them are compared, whichever fits, so that the time does not tell
    how much of a key was right.
    """

    def __init__(self, keys: Sequence[str]):
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def open(self, given: str | None) -> bool:
        """Whether this is one of the keys."""
        digest, fits = _digest(given or ""), False
        for known in self._digests:
            fits |= hmac.compare_digest(known, digest)
        return fits and given is not None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def bearer(authorization: str | None) -> str | None:
    """The key of an Authorization header, 'Bearer KEY'."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def read_keys(file: Path | None, variable: str, flag: str) -> Keys:
    """Keys of a file, one a line, or those of an environment variable, separated by commas.

    Raises:
      UserError: the file cannot be read or holds no key, or a key is too short to be one.
    """
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{flag}={file} cannot be read: {error}") from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        where = f"{flag}={file}"
        if not keys:
            raise UserError(f"{where} holds no key; write one a line")
    else:
        keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
        where = variable
    short = [key for key in keys if len(key) < _SHORTEST or any(c.isspace() for c in key)]
    if short:
        raise UserError(
            f"{where}: a key must have at least {_SHORTEST} characters and no blanks inside"
        )
    return Keys(keys)
