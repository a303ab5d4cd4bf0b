"""Damaged entries in the cache of compiled programs are replaced.

JAX writes an entry in place, so that a kill in the middle leaves half of one. It then warns at
every start, compiles again, and never replaces what it could not use. Here an entry that was read,
and whose program had to be compiled all the same, is replaced by the new one.
"""

from collections.abc import Callable
from typing import Any

from jax._src.lru_cache import LRUCache

_read: set[str] = set()  # entries that JAX has read in this process


def replace_damaged() -> None:
    """Replace damaged entries from now on; further calls do nothing."""
    if not hasattr(LRUCache.put, "replaces"):
        LRUCache.get = _noting(LRUCache.get)
        LRUCache.put = _replacing(LRUCache.put)


def _entry(cache: Any, key: str) -> Any:
    return cache.path / f"{key}-cache"


def _noting(get: Callable[[Any, str], bytes | None]) -> Callable[[Any, str], bytes | None]:
    def noting(self: Any, key: str) -> bytes | None:
        value = get(self, key)
        if value is not None:
            _read.add(str(_entry(self, key)))
        return value

    return noting


def _replacing(put: Callable[[Any, str, bytes], None]) -> Callable[[Any, str, bytes], None]:
    def replacing(self: Any, key: str, value: bytes) -> None:
        entry = _entry(self, key)
        if str(entry) in _read:
            _read.discard(str(entry))
            entry.unlink(missing_ok=True)
            print(f"note: {entry} was damaged; its program was compiled again and is replaced")
        put(self, key, value)

    replacing.replaces = True
    return replacing
