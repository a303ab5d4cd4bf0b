"""Models of the Hugging Face hub: fetched with patience, and never taken half.

Small files are fetched before weights, so that a directory with all its weights has everything else
too, whatever cut an earlier download off.
"""

import errno
import re
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from oel_jax.base import caches
from oel_jax.base.errors import UserError
from oel_jax.models.weight_files import INDEX, incomplete

WAITS = (2.0, 5.0, 15.0)  # seconds between tries
# Seconds after which no further try begins. The hub client tries single requests again too, for
# some 20 s where nothing answers: whoever waits is told within a minute.
PATIENCE = 28.0

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SNAPSHOT = re.compile(r"[0-9a-f]{40}")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def is_id(text: str) -> bool:
    """Whether a text has the form of a hub id, owner/name."""
    return _ID.fullmatch(text) is not None


def revision(directory: Path) -> str | None:
    """The commit of a directory that `fetch` returned; None for any other directory."""
    name = directory.name
    return name if directory.parent.name == "snapshots" and _SNAPSHOT.fullmatch(name) else None


def lasting_name(text: str, directory: Path) -> tuple[str, str | None]:
    """(name, commit) by which a model is found from any directory.

    Args:
      text: what a user called it.
      directory: where it is: of the hub id `text` if `fetch` returned it, else its own.

    Returns: the hub id and its commit, or the absolute path and None.
    """
    commit = revision(directory) if is_id(text) else None
    return (text, commit) if commit else (str(directory.absolute()), None)


@cache
def fetched(repository: str, files: tuple[str, ...]) -> Path:
    """`fetch`, once in a process: a run keeps to one commit and asks the hub only at its start."""
    return fetch(repository, files)


def fetch(
    repository: str,
    files: Sequence[str],
    *,
    waits: Sequence[float] = WAITS,
    patience: float = PATIENCE,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The directory of a model of the hub in the usual cache, downloaded as far as need be.

    Args:
      repository: owner/name.
      files: names or patterns of the small files that are wanted with config.json and weights.
      waits: seconds before each further try after an error of the network or of the hub. When all
        have failed, a whole copy in the cache is used, with a note.
      patience: seconds from the first try after which no further one begins.
      endpoint, cache_dir: another hub and another cache than the client's own.

    Raises:
      UserError: the hub does not have the model or does not give it to this user, it cannot be
        reached and the cache has no whole copy, or the cache cannot be written.
    """
    caches.set_hugging_face_home()
    import huggingface_hub  # slow to import, and local models do not need it

    def get(names: Sequence[str], **more) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                allow_patterns=list(names),
                ignore_patterns=["*/*"],
                endpoint=endpoint,
                cache_dir=cache_dir,
                **more,
            )
        )

    small, weights = ["config.json", INDEX, *files], ["*.safetensors"]
    began = time.monotonic()
    for tries, wait in enumerate((*waits, None), 1):
        try:
            directory = get(small)
            directory = get([*small, *weights], revision=revision(directory))
            break
        # Whatever the client or its HTTP library raises (there are several, of versions with other
        # names) is an error of the network, of the hub, or one of those `_hopeless` knows.
        except Exception as error:
            advice = _hopeless(error)
            if advice:
                raise UserError(f"{repository} {advice} ({_brief(error)})") from error
            if wait is not None and time.monotonic() + wait <= began + patience:
                _note(f"fetching {repository} failed ({_brief(error)}); next try in {wait:g} s")
                time.sleep(wait)
                continue
            directory = _from_cache(get, [*small, *weights], repository, error, tries)
            break
    reason = incomplete(directory)
    if reason:
        raise UserError(
            f"{repository} is not whole in the cache: {reason}. If a download was cut off, start "
            "again with a network; if the repository has no safetensors files, use one that has"
        )
    return directory


def _from_cache(get, names: Sequence[str], repository: str, error: Exception, tries: int) -> Path:
    """A whole copy in the cache, if there is one; else the message about the hub's last error."""
    try:
        directory = get(names, local_files_only=True)
    except Exception:  # of no kind that could be told to the user better than the first
        directory = None
    if directory is None or incomplete(directory):
        count = "1 try" if tries == 1 else f"{tries} tries"
        raise UserError(
            f"{repository} is neither a local directory nor could it be fetched from the Hugging "
            f"Face hub in {count} (the last: {_brief(error)}), and the cache has no whole "
            "copy; check the network, or copy the model here and give its directory"
        ) from error
    _note(
        f"the hub cannot be reached ({_brief(error)}); using the copy of {repository} in the "
        f"cache, {directory}"
    )
    return directory


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from; the client wraps some."""
    while error is not None:
        yield error
        error = error.__cause__


def _hopeless(error: Exception) -> str | None:
    """Why another try would not help, and what would; None for errors that may pass."""
    from huggingface_hub import errors

    for one in _chain(error):
        if isinstance(one, errors.OfflineModeIsEnabled):
            return (
                "is neither a local directory nor whole in the cache, and the hub is not asked: "
                "unset HF_HUB_OFFLINE, or check the name"
            )
        if isinstance(one, errors.GatedRepoError):
            return "is a gated model: accept its terms on its page, then `hf auth login`"
        if isinstance(one, errors.RepositoryNotFoundError):
            return (
                "is neither a local directory nor a model that the hub shows to this user: check "
                "the name and, for a private model, `hf auth login`"
            )
        if isinstance(one, errors.HFValidationError):
            return "is neither a local directory nor a possible id of the hub: check the name"
        status = getattr(getattr(one, "response", None), "status_code", None)
        if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
            return (
                f"could not be fetched: the hub answers with status {status}; check the name and, "
                "for a gated or private model, `hf auth login`"
            )
        if isinstance(one, OSError) and one.errno in _NO_ROOM:
            return "cannot be kept: free some space, or set HF_HOME to a directory to write to"
    return None


def _brief(error: Exception) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
