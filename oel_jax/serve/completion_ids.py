"""Ids of completions that a store can vouch for without remembering them.

An id ends in a code that depends on the rest and on a secret of the store. So feedback can be
checked against ids of any age, also after a restart and by any server of the store.
"""

import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path

_RANDOM, _CODE = 12, 4  # bytes


class CompletionIds:
    """Makes ids and tells its own from others.

    Args:
      secret: of the store.
    """

    def __init__(self, secret: bytes):
        self._secret = secret

    def make(self, prefix: str) -> str:
        """A new id, 'chatcmpl-...'; nobody can guess it."""
        name = secrets.token_hex(_RANDOM)
        return f"{prefix}-{name}{self._code(name)}"

    def knows(self, completion: str) -> bool:
        """Whether it was made with this secret; the number of a choice may follow: '...-1'."""
        _, _, rest = completion.partition("-")
        body, _, number = rest.partition("-")
        name, code = body[: 2 * _RANDOM], body[2 * _RANDOM :]
        known = hmac.compare_digest(self._code(name).encode(), code.encode("utf-8", "replace"))
        return known and (not number or (number.isascii() and number.isdigit()))

    def _code(self, name: str) -> str:
        made = hmac.new(self._secret, name.encode("utf-8", "replace"), hashlib.sha256)
        return made.digest()[:_CODE].hex()


def secret_of(directory: Path) -> bytes:
    """The secret of a store, made by the first server that asks for it."""
    path = directory / ".secret"
    directory.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        handle, name = tempfile.mkstemp(dir=directory, prefix=".secret.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(32))
                file.flush()
                os.fsync(file.fileno())
            os.link(name, path)
        except FileExistsError:
            pass  # another server was faster
        finally:
            os.unlink(name)
    return path.read_bytes()
