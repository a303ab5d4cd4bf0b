"""Checkpoints inside a round: when they are written, how many stay, and which one to resume from.

Orbax writes them in the background, each process its own shards, and gives a directory its name
when it is complete: a save that was killed leaves nothing that could be taken for a checkpoint.
What is saved does not depend on when: a run that resumes from any of them ends in the same bits, on
these or on other devices.
"""

import errno
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from oel_jax.base.errors import UserError
from oel_jax.parallel import processes


class RoundCheckpoints:
    """The checkpoints of one round; a context manager that waits for writes at its end.

    Args:
      directory: absolute; it is made if need be.
      every: optimizer steps between two of them.
      minutes: and at most so many minutes between them; None = only steps count.
      keep: how many stay; older ones are deleted when a new one is complete.
    """

    def __init__(self, directory: Path, *, every: int, minutes: float | None, keep: int):
        self._directory, self._every, self._minutes = directory, every, minutes
        self._saved_at = time.monotonic()
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def due(self, step: int) -> bool:
        """Whether one should be written now; the same answer on all processes."""
        minutes = (time.monotonic() - self._saved_at) / 60
        late = self._minutes is not None and minutes >= self._minutes
        return step % self._every == 0 or bool(processes.from_first(late))

    def save(self, step: int, tree: Any) -> None:
        """Begin to write the checkpoint of a step; nothing is done if it is there.

        Raises:
          UserError: the disk is full, now or when the last one was written.
        """
        if step in self._manager.all_steps():
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        free = processes.from_first(shutil.disk_usage(self._directory).free)
        if free < needed * 1.05:
            self._refuse(step, f"it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
        try:
            self._manager.save(step, args=ocp.args.StandardSave(tree))
        except OSError as error:
            self._refuse(step, error.strerror or str(error), error)
        self._saved_at = time.monotonic()

    def wait(self) -> None:
        """Until all writes are complete.

        Raises:
          UserError: the disk is full.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            if isinstance(error, OSError) or "No space left" in str(error):
                self._refuse(None, getattr(error, "strerror", None) or str(error), error)
            raise

    def _refuse(self, step: int | None, why: str, error: BaseException | None = None) -> None:
        """Say what is kept and what to do."""
        number = getattr(error, "errno", errno.ENOSPC)
        what = f"the checkpoint of step {step}" if step else "the last checkpoint"
        kept = f"that of step {self.steps[-1]} is kept" if self.steps else "there is no older one"
        free = (
            "free some room there (old workdirs, policies of earlier rounds that nobody needs)"
            if number in (errno.ENOSPC, errno.EDQUOT)
            else "check that file system"
        )
        raise UserError(
            f"{self._directory}: {what} cannot be written: {why}; {kept}. Please {free} and run "
            "the same command again"
        ) from error

    def restore(self, step: int, like: Any) -> Any:
        """The checkpoint of a step in the shapes and places of `like`, whatever devices wrote it.

        Raises:
          UserError: it belongs to another model or optimizer, or it is damaged.
        """
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax raises many kinds; none says which run it was
            first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
            raise UserError(
                f"{self._directory / str(step)} cannot be restored: it is damaged, or of another "
                f"model or config ({type(error).__name__}: {first}). Delete this directory to "
                "begin the round's consolidation anew"
            ) from error

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints after `step`."""
        self.wait()
        for kept in self.steps:
            if kept > step:
                self._manager.delete(kept)

    def __enter__(self) -> "RoundCheckpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.wait()
        self._manager.close()
