"""What the report page shows, read from a workdir; what is not there yet is left out.

Imports no JAX and no stage: everything comes from files.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.config.old_values import saved_config
from oel_jax.report.gains import gains
from oel_jax.runs.metrics import read_metrics
from oel_jax.runs.workdir import Workdir, samples_of


@dataclass(frozen=True)
class Evaluation:
    """One measured policy.

    Attributes:
      x: place on the axis of rounds: 0 = the start, r = after round r, r - 1/2 = the policy of
        round r before consolidation, with the round's knowledge in its prompt.
      kind: 'start', 'consolidated' or 'in_context'.
      result: the evaluation file.
      games: whole games, see `evaluate.evaluate`; [] in workdirs of older versions.
    """

    x: float
    round: int
    kind: str
    result: dict[str, Any]
    games: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """What was measured, in words."""
        return {
            "start": "start",
            "in_context": f"round {self.round}, knowledge in context",
            "consolidated": f"after round {self.round}",
        }[self.kind]


@dataclass(frozen=True)
class Line:
    """A line of the knowledge of a round.

    Attributes:
      chains: texts of the round that hold it.
      before: texts of the round before that hold it; None in the first round.
    """

    text: str
    chains: int
    before: int | None

    @property
    def mark(self) -> str:
        """'' (nothing to compare with), 'new', 'kept' or 'gone'."""
        if self.before is None:
            return ""
        return "gone" if not self.chains else "kept" if self.before else "new"


@dataclass
class RunData:
    """A run as far as it has come.

    Attributes:
      name: of the workdir; in a study its place below the study's.
      manifest: as written by `Workdir`.
      rows: of metrics.jsonl.
      rounds: those that have begun.
      evaluations: in the order of x.
      curves: round -> [(trajectories, evaluation result)] with knowledge in context.
      texts: round -> the K knowledge texts.
      preflights: round -> what each text gains in context.
      gains: both gains of each round, see `oel_jax.report.gains`.
    """

    name: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    rounds: list[int] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    curves: dict[int, list[tuple[int, dict[str, Any]]]] = field(default_factory=dict)
    texts: dict[int, list[str]] = field(default_factory=dict)
    preflights: dict[int, dict[str, Any]] = field(default_factory=dict)
    gains: list[dict[str, Any]] = field(default_factory=list)

    def of_kind(self, *kinds: str) -> list[Evaluation]:
        """Evaluations of these kinds, by x."""
        return [e for e in self.evaluations if e.kind in kinds]

    def seconds(self, round_number: int) -> dict[str, float]:
        """Stage -> wall-clock seconds of the finished stages of a round."""
        stages = self.manifest["stages"]
        return {e["stage"]: e["seconds"] for e in stages if e["round"] == round_number}


def collect(workdir: Workdir) -> RunData:
    """Read everything the page shows.

    Raises:
      UserError: there is no run in the workdir, or one of its files is damaged.
    """
    if not workdir.config_file.is_file() or not workdir.manifest_file.is_file():
        raise UserError(
            f"--workdir={workdir.root} holds no run (config.json or manifest.json is missing); "
            "give the --workdir of `python -m oel_jax.main`"
        )
    workdir.seconds(0)  # refuses a manifest of another version
    config = saved_config(workdir.config_file)
    if not {"game", "model", "extract"} <= config.keys():
        raise UserError(f"{workdir.config_file} is not the config of a run; restore it")
    data = RunData(
        name=workdir.label,
        config=config,
        manifest=read_json(workdir.manifest_file),
        rows=read_metrics(workdir.metrics_file),
    )
    if workdir.start_evaluation.exists():
        data.evaluations.append(_evaluation(workdir.start_evaluation, 0.0, 0, "start"))
    number = 1
    while workdir.round(number).is_dir():
        _add_round(data, workdir, number)
        number += 1
    data.gains = gains(workdir, len(data.rounds))
    return data


def _add_round(data: RunData, workdir: Workdir, number: int) -> None:
    data.rounds.append(number)
    for kind, x in (("in_context", number - 0.5), ("consolidated", float(number))):
        file = workdir.evaluation(number, kind)
        if file.exists():
            data.evaluations.append(_evaluation(file, x, number, kind))
    if workdir.knowledge(number).exists():
        data.texts[number] = read_json(workdir.knowledge(number))["texts"]
    if workdir.preflight(number).exists():
        data.preflights[number] = read_json(workdir.preflight(number))
    # What is there, which may be more than the config asks for by now.
    names = (workdir.round(number) / "evaluate").glob("curve_*.json")
    files = {int(n): f for f in names if (n := f.stem.removeprefix("curve_")).isdecimal()}
    if files or data.config.get("evaluate", {}).get("curve"):
        # A point of the curve that is the round's own n is stored once, as in_context.
        files[data.config["extract"]["n"]] = workdir.evaluation(number, "in_context")
    measured = [(n, read_json(file)) for n, file in sorted(files.items()) if file.exists()]
    if measured:
        data.curves[number] = measured


def _evaluation(file, x: float, number: int, kind: str) -> Evaluation:
    samples = samples_of(file)
    games = read_json(samples)["games"] if samples.exists() else []
    return Evaluation(x, number, kind, read_json(file), games)


def knowledge_lines(texts: Sequence[str], before: Sequence[str] | None) -> list[Line]:
    """Distinct lines of K texts, the most common first, then the lines that are gone.

    A line counts once per text, however often the text repeats it.
    """
    now, then = _chains_with(texts), _chains_with(before or ())
    lines = [
        Line(text, count, None if before is None else then[text])
        for text, count in sorted(now.items(), key=lambda item: (-item[1], item[0]))
    ]
    gone = sorted((item for item in then.items() if item[0] not in now), key=lambda i: (-i[1], i))
    return lines + [Line(text, 0, count) for text, count in gone]


def _chains_with(texts: Sequence[str]) -> Counter[str]:
    return Counter(line for text in texts for line in {s.strip() for s in text.split("\n")} - {""})


def number(value: Any) -> float | None:
    """A number of metrics.jsonl; None for what is not finite ("NaN", "Infinity")."""
    return float(value) if isinstance(value, (int, float)) else None


def generated_tokens(data: RunData, round_number: int) -> dict[str, int]:
    """Stage -> tokens that the model wrote, from means and counts of the stage's rows."""
    config, found = data.config, {}
    extract, consolidate = config["extract"], config["consolidate"]
    chains = extract["chains"]
    games = {
        "extract": (1 if extract["trajectories"] == "shared" else chains) * extract["n_run"],
        "deploy": config["deploy"]["games_per_step"] * consolidate["steps"],
    }
    measured = [e.result["games"] for e in data.evaluations if e.round == round_number]
    games_each = max(measured, default=0)  # as many as were played, whatever the config says now
    for row in (row for row in data.rows if row["round"] == round_number):
        values = {name: number(value) or 0.0 for name, value in row["values"].items()}
        stage, tokens = row["stage"], values.get("response_tokens", 0.0)
        if stage == "deploy" and "extract_turns" in values:  # a chat round has none
            tokens = sum(
                count * values[f"{purpose}_turns"] * values[f"{purpose}_response_tokens"]
                for purpose, count in games.items()
            )
        elif stage == "extract":
            tokens *= chains
        elif stage == "demonstrate":
            tokens *= games["deploy"] * values["turns"]
        elif stage == "preflight":
            tokens *= values["games"] * values["turns"]
        elif stage == "consolidate" and consolidate.get("mode", "on_policy") == "on_policy":
            tokens *= values["prefixes"]
        elif stage.startswith("evaluate_") and "turns" in values:
            stage, tokens = "evaluate", tokens * values["turns"] * games_each
        else:
            continue
        found[stage] = found.get(stage, 0.0) + tokens
    return {stage: round(tokens) for stage, tokens in found.items()}


def stage_times(data: RunData, round_number: int) -> dict[str, tuple[float, float | None]]:
    """Stage -> (seconds, seconds of it spent compiling or None where that was not recorded)."""
    compiled: dict[str, float | None] = {}
    for row in data.rows:
        stage = row["stage"].removeprefix("time_")
        if row["round"] == round_number and stage != row["stage"]:
            compiled[stage] = number(row.get("time", {}).get(f"{stage}_compile_seconds"))
    return {
        stage: (seconds, compiled.get(stage))
        for stage, seconds in data.seconds(round_number).items()
    }
