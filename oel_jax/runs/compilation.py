"""Where compiled programs are kept between runs."""

import importlib.util

import jax

from oel_jax.base import caches, compile_cache, paths
from oel_jax.base.errors import UserError
from oel_jax.config.rules import BUCKETS


def keep_compiled(setting: str | None) -> None:
    """Keep compiled programs between runs, so that only the first run pays for them.

    Args:
      setting: `config.compilation_cache`.
    """
    if setting == "off":
        return
    jax.config.update("jax_compilation_cache_dir", _cache_text(setting))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    compile_cache.replace_damaged()


def _cache_text(setting: str | None) -> str:
    """The cache's place as JAX is to read it: a URL unchanged, for it can use a bucket itself.

    Raises:
      UserError: a package that JAX needs for this URL is not installed.
    """
    kind = paths.scheme(setting) if setting else None
    if kind is None:
        usual = caches.compiled_programs
        return str(paths.local(setting, "config.compilation_cache") if setting else usual())
    for package in ("etils", BUCKETS[kind]):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"config.compilation_cache is {setting!r}, for which JAX needs the package "
                f"{package}: install it, or give a directory of this machine, or 'off'"
            )
    return setting
