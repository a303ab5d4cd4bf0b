"""Which policy of a workdir is to be served. Imports no JAX.

A policy is accepted when the manifest says that its round is consolidated and all its files are
there. `WORKDIR/serving.json` names policies that are refused: someone rolled back from them, or a
guard did. Round 0 is the model that the run started from.

    {"schema": "oel.serving/1",
     "refused": {"round_002": {"reason": "...", "time": "2026-01-31T12:00:00+00:00"}}}
"""

import datetime
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.config.old_values import saved_config
from oel_jax.runs.workdir import Workdir

SCHEMA = "oel.serving/1"
START = "round_000"


class Policy(NamedTuple):
    """A policy by name.

    Attributes:
      name: of its round, 'round_003'; 'round_000' is the start.
      path: what `load_model` takes: a directory, or for the start what the config says.
    """

    name: str
    path: str


def newest_policy(workdir: Workdir) -> Policy:
    """The accepted policy of the last round.

    Raises:
      UserError: there is no run in the workdir, a file of it is damaged, or even the start is
        refused.
    """
    return accepted_policies(workdir)[0]


def accepted_policies(workdir: Workdir) -> list[Policy]:
    """All accepted policies, the newest first; see `newest_policy`."""
    found, out = Workdir(workdir.root), refused(workdir)  # a manifest that is not read yet
    rounds = range(found.rounds(), 0, -1) if found.manifest_file.exists() else ()
    policies = [
        Policy(found.round(number).name, str(found.policy(number)))
        for number in rounds
        if found.finished(number, "consolidate") and (found.policy(number) / "config.json").exists()
    ]
    policies.append(Policy(START, saved_config(found.config_file)["model"]["path"]))
    policies = [policy for policy in policies if policy.name not in out]
    if not policies:
        raise UserError(
            f"{serving_file(workdir)} refuses every policy of {workdir.root}; delete the one that "
            "is to be served from it"
        )
    return policies


def incomplete_policies(workdir: Workdir) -> list[str]:
    """Rounds that are recorded as consolidated whose files are missing or cut short, by name."""
    found = Workdir(workdir.root)
    rounds = range(1, found.rounds() + 1) if found.manifest_file.exists() else ()
    return [
        found.round(number).name
        for number in rounds
        if found.entry(number, "consolidate") and not found.finished(number, "consolidate")
    ]


def check_policy(workdir: Workdir, name: str) -> None:
    """Compare the files of a policy with the hashes in the manifest.

    Raises:
      UserError: one is missing or has changed.
    """
    if name != START:
        number = int(name.removeprefix("round_"))
        Workdir(workdir.root).verify(number, "consolidate")


def serving_file(workdir: Workdir):
    """Where refused policies are."""
    return workdir.root / "serving.json"


def refused(workdir: Workdir) -> dict[str, dict[str, str]]:
    """Refused policies: name -> reason and time.

    Raises:
      UserError: the file is damaged.
    """
    file = serving_file(workdir)
    if not file.exists():
        return {}
    stored = read_json(file)
    right = isinstance(stored, dict) and stored.get("schema") == SCHEMA
    if not right or not isinstance(stored.get("refused"), dict):
        raise UserError(f"{file} is no {SCHEMA!r}; restore it, or delete it to refuse no policy")
    return stored["refused"]


def refuse_policy(workdir: Workdir, name: str, reason: str) -> None:
    """Record that a policy is not to be served.

    Raises:
      UserError: the file is damaged or cannot be written.
    """
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with _alone(workdir):
        _write(workdir, refused(workdir) | {name: {"reason": reason, "time": time}})


def allow(workdir: Workdir, name: str) -> None:
    """Take a policy off the refused ones, see `refuse_policy`."""
    with _alone(workdir):
        _write(workdir, {key: why for key, why in refused(workdir).items() if key != name})


def _write(workdir: Workdir, policies: dict[str, Any]) -> None:
    file = serving_file(workdir)
    try:
        write_json(file, {"schema": SCHEMA, "refused": policies})
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error


@contextmanager
def _alone(workdir: Workdir) -> Iterator[None]:
    """One process at a time changes the file."""
    place = os.open(workdir.root, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)
