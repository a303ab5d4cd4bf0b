"""User side of a chat round: a frozen part of the conversations that users have had.

In place of games a round takes conversations that no round before has used: imported
ones (`logs.path`) and those that a server has recorded in the workdir. They are split by user into
those that are learned from and those that are held out, always in the same way, and copied into the
round's store of trajectories:

    extract_0000.jsonl ..  what each chain of knowledge is drawn from
    deploy_0000.jsonl ..   whose answers are trained on
    heldout_0000.jsonl     what evaluation asks; nothing else reads it
    snapshot.json          which conversations, how many of their turns, and hashes of the files

A snapshot that is there is never made again, so a run that is resumed reads the same bytes. Imports
no game.
"""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_collections

from oel_jax.actor.conversations import (
    LeftOut,
    Preparation,
    by_name,
    policies_of,
    seconds_since,
)
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_bytes, write_json
from oel_jax.data.conversations import ConversationStore
from oel_jax.data.trajectories import Trajectory
from oel_jax.data.trajectory_files import TrajectoryStore
from oel_jax.data.trajectory_schema import encode
from oel_jax.parallel import processes
from oel_jax.runs.console import Progress
from oel_jax.runs.metrics import table
from oel_jax.runs.policies import policy_directory
from oel_jax.runs.session import Run
from oel_jax.runs.workdir import Workdir, sha256

SCHEMA = "oel.snapshot/1"
_PAUSE = 2.0  # seconds between two looks for new conversations, at least


@dataclass
class _New:
    """What is new since the round before.

    Attributes:
      train, heldout: (conversation, turns of it that earlier rounds have used).
      left_out: reason -> number.
      unfinished: conversations in which somebody may still be talking (`logs.idle`).
    """

    train: list[tuple[Trajectory, int]] = field(default_factory=list)
    heldout: list[tuple[Trajectory, int]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    unfinished: int = 0

    @property
    def count(self) -> int:
        return len(self.train) + len(self.heldout)


def deploy(run: Run, round_number: int) -> list[Path]:
    """Freeze the round's conversations; returns the files.

    Raises:
      UserError: there are too few conversations, or the model's chat template cannot show them.
    """
    processes.first_does("the snapshot is made", lambda: _make(run, round_number))
    made = processes.json_from_first(run.workdir.snapshot(round_number))
    directory = run.workdir.trajectories(round_number)
    _log(run, round_number, made)
    return [run.workdir.snapshot(round_number), *(directory / name for name in made["files"])]


def _make(run: Run, round_number: int) -> None:
    file = run.workdir.snapshot(round_number)
    if file.exists():
        check_snapshot(run.workdir, round_number)
        return
    config = run.config
    new = _wait_for(run, round_number)
    preparation = Preparation(
        config,
        policy_directory(config, run.workdir, round_number),
        run.today,
        round_number,
    )
    sides = {"train": new.train, "heldout": new.heldout}
    most = {
        "train": config.consolidate.steps * config.deploy.games_per_step,
        "heldout": config.evaluate.conversations,
    }
    order = {side: _ordered(part, config.seed, round_number) for side, part in sides.items()}
    train, train_seen = _usable(order["train"], preparation, new.left_out, most["train"])
    heldout, heldout_seen = _usable(order["heldout"], preparation, new.left_out, most["heldout"])
    seen = {"train": train_seen, "heldout": heldout_seen}
    reasons = [preparation.hindrance(one) for one in train]
    new.left_out.update(reason for reason in reasons if reason)
    pool = [one for one, reason in zip(train, reasons, strict=True) if not reason]
    chains = [_chain(config, round_number, number, pool, new) for number in _chains(config)]
    store = TrajectoryStore(run.workdir.trajectories(round_number))
    store.directory.mkdir(parents=True, exist_ok=True)
    for old in store.directory.glob("*.jsonl"):  # of a run that was killed before its snapshot
        old.unlink()
    size = config.deploy.games_per_step
    files = {
        store.path("extract", number): [replace(one, purpose="extract", chain=number) for one in c]
        for number, c in enumerate(chains)
    }
    for number, first in enumerate(range(0, len(train), size)):
        files[store.path("deploy", number)] = train[first : first + size]
    if heldout:
        files[run.workdir.heldout(round_number)] = heldout
    for path, content in files.items():
        write_bytes(path, b"".join(map(encode, content)))
    record = {
        "schema": SCHEMA,
        "round": round_number,
        "new": new.count,
        # What was taken or cannot be used; what there was no room for is new to the next round too.
        "conversations": {
            one.id: {"turns": len(one.turns), "side": side}
            for side, part in order.items()
            for one, _ in part[: seen[side]]
        },
        "train": len(train),
        "train_turns": sum(len(one.turns) for one in train),
        "heldout": len(heldout),
        "users": len({one.user for one in train + heldout} - {None}),
        "left_out": dict(sorted(new.left_out.items())),
        "files": {path.name: sha256(path) for path in files},
    }
    write_json(file, record)


def check_snapshot(workdir: Workdir, round_number: int) -> None:
    """UserError if a file of a snapshot is missing or has changed."""
    made = read_json(workdir.snapshot(round_number))
    for name, digest in made["files"].items():
        path = workdir.trajectories(round_number) / name
        if not path.is_file() or sha256(path) != digest:
            raise UserError(
                f"{path} is not what {workdir.snapshot(round_number)} says; restore it, or remove "
                "the round's directory to freeze the conversations again"
            )


# --- what is new ----------------------------------------------------------------------------------


def _wait_for(run: Run, round_number: int) -> _New:
    """The new conversations, as soon as there are as many as the config asks for."""
    wanted = run.config.logs.wait
    if not wanted:
        return _look(run, round_number)
    answers = _Answers(run.workdir)
    label = f"round {round_number} deploy: waits for new conversations"
    with Progress(wanted, "conversations", label, every=run.config.log.console_every) as progress:
        progress.say("reads what is there")
        while True:
            began, before = time.monotonic(), answers.count()
            new = _look(run, round_number)
            progress.update(max(0, min(new.count, wanted) - progress.done))
            if new.count >= wanted:
                return new
            time.sleep(max(_PAUSE, time.monotonic() - began))
            # To read all is dear, and no conversation is new without an answer.
            missing = wanted - new.count - new.unfinished
            while not run.config.logs.path and (fresh := answers.count() - before) < missing:
                progress.say(f"{fresh} answers since the last look")
                time.sleep(_PAUSE)
            progress.say("reads what is there")


class _Answers:
    """Counts the lines of a workdir's store of conversations; reads only what was appended."""

    def __init__(self, workdir: Workdir):
        self._store = ConversationStore(workdir.conversations)
        self._read: dict[Path, int] = {}
        self._lines = 0

    def count(self) -> int:
        """How many answers have been recorded."""
        if self._store.directory.is_dir():
            for path in self._store.files("exchanges"):
                with open(path, "rb") as file:
                    file.seek(self._read.get(path, 0))
                    while piece := file.read(1 << 20):
                        self._lines += piece.count(b"\n")
                    self._read[path] = file.tell()
        return self._lines


def _look(run: Run, round_number: int) -> _New:
    """Everything that no earlier round has used."""
    used, side_of, new = _used(run.workdir, round_number), {}, _New()
    latest: dict[str, Trajectory] = {}
    logs, current = run.config.logs, f"round_{round_number - 1:03d}"
    conversations = found(run.config, run.workdir)
    for one in by_name(conversations) if logs.wrapper else conversations:
        if one.id is None:
            new.left_out["a game, not a conversation"] += 1
        elif logs.policy == "current" and policies_of(one) != {current}:
            new.left_out[f"another policy than {current} answered (config.logs.policy)"] += 1
        elif seconds_since(one) < logs.idle:
            new.unfinished += 1  # the next look or round will take it
        elif one.id not in latest or len(one.turns) > len(latest[one.id].turns):
            latest[one.id] = one
    for one in latest.values():
        turns, side = used.get(one.id, (0, None))
        own = side_of.setdefault(one.user or one.id, _side(run.config, one))
        if len(one.turns) <= turns:
            continue
        if side is not None and side != own:
            new.left_out["its user is on the other side of the split by now"] += 1
            continue
        (new.heldout if own == "heldout" else new.train).append((one, turns))
    return new


def found(config: ml_collections.ConfigDict, workdir: Workdir) -> Iterator[Trajectory]:
    """All conversations that a run can see, used or not."""
    if config.logs.path:
        from oel_jax.logs.forgetting import Forgotten
        from oel_jax.logs.reading import read_conversations
        from oel_jax.logs.redaction import Redactor

        yield from read_conversations(
            config.logs.path,
            feedback_fields=config.logs.feedback_fields,
            redact=Redactor() if config.logs.redact else None,
            forgotten=Forgotten.of(workdir),
        )
    if workdir.conversations.is_dir():
        yield from ConversationStore(workdir.conversations).read()


def _used(workdir: Workdir, round_number: int) -> dict[str, tuple[int, str]]:
    """Conversation -> (turns that earlier rounds have used, its side)."""
    found: dict[str, tuple[int, str]] = {}
    for number in range(1, round_number):
        for name, one in read_json(workdir.snapshot(number))["conversations"].items():
            found[name] = (one["turns"], one["side"])
    return found


def _side(config: ml_collections.ConfigDict, one: Trajectory) -> str:
    """The side of a conversation: that of its user, or its own where the user is not known.

    It follows from the name alone, so that it is the same in every round.
    """
    kind = "conversation" if one.user is None else "user"
    place = _number(f"held out {kind} {one.user or one.id}") / 2**64
    return "heldout" if place < config.logs.heldout else "train"


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


# --- what is taken --------------------------------------------------------------------------------


def _ordered(
    new: Iterable[tuple[Trajectory, int]], seed: int, round_number: int
) -> list[tuple[Trajectory, int]]:
    """In an order of the seed, whatever order they were found in."""
    return sorted(
        new, key=lambda pair: (_number(f"{seed} {round_number} {pair[0].id}"), pair[0].id)
    )


def _usable(
    new: Sequence[tuple[Trajectory, int]],
    preparation: Preparation,
    left_out: Counter[str],
    most: int,
) -> tuple[list[Trajectory], int]:
    """The first ones that the policy can read, at most `most`, and how many were looked at for it.

    Others are counted by reason.
    """
    taken: list[Trajectory] = []
    seen = 0
    for one, used in new:
        if len(taken) == most:
            break
        seen += 1
        try:
            taken.append(preparation.prepare(one, used, left_out))
        except LeftOut as reason:
            left_out[str(reason)] += 1
    return taken, seen


def _chains(config: ml_collections.ConfigDict) -> range:
    return range(1 if config.extract.trajectories == "shared" else config.extract.chains)


def _chain(
    config: ml_collections.ConfigDict,
    round_number: int,
    number: int,
    pool: Sequence[Trajectory],
    new: _New,
) -> list[Trajectory]:
    """The conversations of a chain, drawn from those that are trained on.

    Raises:
      UserError: there are not enough, or they are of too few users.
    """
    e = config.extract
    limit = max(1, int(e.user_share * e.n_run + 1e-9))
    order = list(pool)
    random.Random(f"chain {config.seed} {round_number} {number}").shuffle(order)
    taken, of_user = [], Counter[str]()
    for one in order:
        who = one.user or f"conversation {one.id}"
        if len(taken) < e.n_run and of_user[who] < limit:
            of_user[who] += 1
            taken.append(one)
    if len(taken) == e.n_run:
        return taken
    reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(new.left_out.items()))
    what = (
        f"{new.count} new conversations, {len(new.heldout)} of them held out, {len(pool)} that can "
        f"be learned from" + (f" (left out: {reasons})" if reasons else "")
    )
    if len(pool) < e.n_run:
        raise UserError(
            f"round {round_number}: {what}, but a chain of knowledge needs {e.n_run}; import or "
            "record more (config.logs.path), let the round wait for them (config.logs.wait), or "
            "lower config.extract.n and config.extract.n_run"
        )
    users = len({one.user or one.id for one in pool})
    raise UserError(
        f"round {round_number}: {what}, but they are of {users} user(s), and with "
        f"config.extract.user_share={e.user_share:g} one user may have {limit} of the {e.n_run} "
        "conversations of a chain; raise it or lower config.extract.n_run"
    )


def _log(run: Run, round_number: int, made: dict[str, Any]) -> None:
    """Metrics and a table of what was taken and what was not."""
    values = {
        "conversations": float(made["train"]),
        "turns": (made["train_turns"], made["train"]),
        "heldout": float(made["heldout"]),
        "left_out": float(sum(made["left_out"].values())),
    }
    run.metrics.rewind("deploy", round_number, round_number - 1)
    run.metrics.scalars("deploy", round_number, values, round=round_number)
    rows = [
        ["that no round has used", made["new"]],
        ["to learn from", made["train"]],
        ["their answers", made["train_turns"]],
        ["held out", made["heldout"]],
        *([f"left out: {reason}", count] for reason, count in made["left_out"].items()),
    ]
    print(table(rows, ["conversations", "number"]))
    if not made["heldout"]:
        print(
            "no conversation is held out, so this round is not evaluated on any: "
            f"config.logs.heldout={run.config.logs.heldout:g} is the share of users"
        )
