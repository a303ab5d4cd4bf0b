"""A run as plain objects, for notebooks: `oel_jax.read_run(WORKDIR)`. Imports no JAX."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.data import trajectory_files
from oel_jax.data.trajectories import PURPOSES, Trajectory
from oel_jax.report.run_data import RunData, collect
from oel_jax.runs.workdir import Workdir

_NUMBERS = ("pass_rate", "response_tokens", "turns", "games")


@dataclass(frozen=True, repr=False)
class RoundResults:
    """What one round made; what is not there yet is None or empty.

    Attributes:
      number: from 1.
      in_context, consolidated: the evaluation of P_r with the round's knowledge in its prompt, and
        of P_{r+1} without: 'pass_rate', 'ci95', 'response_tokens', 'turns', 'passed', ...
      curve: trajectories -> evaluation with the knowledge drawn from that many.
      preflight: what each text gains in context.
      gain: {'in_context', 'after', 'error'}, see `oel_jax.report.gains`.
      knowledge: the K texts.
      seconds: stage -> wall-clock seconds.
      policy: Hugging Face directory of P_{r+1}.
    """

    number: int
    in_context: dict[str, Any] | None
    consolidated: dict[str, Any] | None
    curve: dict[int, dict[str, Any]]
    preflight: dict[str, Any] | None
    gain: dict[str, Any]
    knowledge: tuple[str, ...]
    seconds: dict[str, float]
    policy: Path | None
    _workdir: Workdir = field(compare=False)

    def __repr__(self) -> str:
        """One line: numbers, and how many texts there are."""
        rates = [("in context", self.in_context), ("after", self.consolidated)]
        shown = [f"{name} {found['pass_rate']:.1%}" for name, found in rates if found]
        texts = f"{len(self.knowledge)} knowledge texts"
        return f"RoundResults({self.number}: {', '.join([*shown, texts])})"

    def trajectories(self, purpose: str = "") -> list[Trajectory]:
        """The games that the round's finished stages have recorded.

        Args:
          purpose: 'extract', 'deploy' or 'demonstrate'; '' for all.

        Raises:
          UserError: an unknown purpose, or a file that is missing or damaged.
        """
        if purpose and purpose not in PURPOSES:
            known = ", ".join(PURPOSES)
            raise UserError(f"there are no trajectories for {purpose!r}; choose one of {known}")
        found = []
        for stage in ("deploy", "demonstrate"):
            entry = self._workdir.entry(self.number, stage)
            for file in entry["files"] if entry else ():
                if file["path"].endswith(".jsonl"):
                    found += trajectory_files.read(self._workdir.root / file["path"])
        return [one for one in found if purpose in ("", one.purpose)]


@dataclass(frozen=True, repr=False)
class RunResults:
    """A run as far as it has come.

    Attributes:
      workdir: its directory.
      config: as the run was started with, plain JSON types.
      start: the evaluation of P_1 without knowledge; None if it was not made.
      rounds: those that have begun.
    """

    workdir: Path
    config: dict[str, Any]
    start: dict[str, Any] | None
    rounds: tuple[RoundResults, ...]

    def __repr__(self) -> str:
        """A few lines: the pass rates."""
        start = f"start {self.start['pass_rate']:.1%}" if self.start else "not evaluated"
        lines = [f"RunResults({self.workdir}: {start}", *(f"  {one!r}" for one in self.rounds)]
        return "\n".join(lines) + ")"

    def rows(self) -> list[dict[str, Any]]:
        """All evaluations, one row each: round, what, pass_rate, ci95_low, ci95_high, ..."""
        found = [_row(0, "start", self.start)] if self.start else []
        for one in self.rounds:
            for name in ("in_context", "consolidated"):
                result = getattr(one, name)
                found += [_row(one.number, name, result)] if result else []
        return found

    def to_dataframe(self) -> Any:
        """`rows` as a pandas DataFrame.

        Raises:
          UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError(
                "to_dataframe needs pandas, which oel_jax does not bring: pip install pandas; "
                "rows() gives the same as a list of dicts"
            ) from error
        return pandas.DataFrame(self.rows())


def _row(number: int, what: str, result: dict[str, Any]) -> dict[str, Any]:
    low, high = result["ci95"]
    numbers = {name: result[name] for name in _NUMBERS if name in result}
    return {"round": number, "what": what, **numbers, "ci95_low": low, "ci95_high": high}


def read_run(workdir: str | Path) -> RunResults:
    """Read what a run has made so far; also while it is running.

    Raises:
      UserError: there is no run in the workdir, or one of its files is damaged.
    """
    directory = Workdir(workdir)
    data = collect(directory)
    starts = data.of_kind("start")
    return RunResults(
        workdir=directory.root,
        config=data.config,
        start=starts[0].result if starts else None,
        rounds=tuple(_round(data, directory, number) for number in data.rounds),
    )


def _round(data: RunData, workdir: Workdir, number: int) -> RoundResults:
    results = {one.kind: one.result for one in data.evaluations if one.round == number}
    gained = data.gains[number - 1]
    policy = workdir.policy(number)
    return RoundResults(
        number=number,
        in_context=results.get("in_context"),
        consolidated=results.get("consolidated"),
        curve=dict(data.curves.get(number, [])),
        preflight=data.preflights.get(number),
        gain={name: gained[name] for name in ("in_context", "after", "error")},
        knowledge=tuple(data.texts.get(number, ())),
        seconds=data.seconds(number),
        policy=policy if workdir.finished(number, "consolidate") and policy.is_dir() else None,
        _workdir=workdir,
    )
