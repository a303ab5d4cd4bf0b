"""A study on paper: variants, what is measured, what is expected; all checks before a run starts.

A study file has a docstring, a tuple `PRESETS` whose first name is the default, and

    def get_study(preset: str) -> Study

Nothing here loads a model or JAX.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_collections

from oel_jax import environments
from oel_jax.base.errors import UserError
from oel_jax.config.chat_checks import is_chat
from oel_jax.config.checks import validate
from oel_jax.config.defaults import with_fields
from oel_jax.config.fields import refuse
from oel_jax.config.file import existing, explain, load_module
from oel_jax.runs.stages import NAMES

_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")  # what is a file name everywhere


@dataclass(frozen=True)
class Other:
    """As the value of an override: the workdir of another variant's run of the same seed."""

    variant: str


@dataclass(frozen=True)
class Variant:
    """One column of a comparison: an ordinary run with some fields changed.

    Attributes:
      name: also the name of its directory.
      changes: dotted config path -> value, or `Other(variant)`, which is then run first.
      config: base config, if it is not the study's.
      stages: the stages that are run; a variant that only makes something for another one needs
        few. Without 'evaluate' it has no line in the tables.
      seeds: how many of the study's loop seeds, from the first, it is run with; 0 for all.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    config: ml_collections.ConfigDict | None = None
    stages: tuple[str, ...] = NAMES
    seeds: int = 0


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes:
      name: as tables show it.
      evaluation: 'start', 'in_context', 'consolidated', 'curve_003', 'start_skills', 'skills', or
        '' for a training metric.
      round: from 1; 0 for 'start'.
      value: 'pass_rate' (its interval goes over seeds and boards), another number of the
        evaluation such as 'response_tokens', or the name of a training metric (both: over seeds).
      stage: of a training metric: the stage in metrics.jsonl whose last row of the round counts.
      per_start: divide by the same number of the starting model.
    """

    name: str
    evaluation: str = ""
    round: int = 0
    value: str = "pass_rate"
    stage: str = ""
    per_start: bool = False


Point = tuple[str, str]  # (variant, measure), by name


@dataclass(frozen=True)
class Expectation:
    """Something the study expects to see: `higher` above `lower`, or its own test.

    Attributes:
      higher, lower: (variant, measure); the mean of the first must be above that of the second.
      apart: the two 95 % intervals must not touch either.
      test: instead of the two sides: gets `oel_jax.study.results.Results`, returns (whether it
        held, the numbers in words).
    """

    name: str
    higher: Point | None = None
    lower: Point | None = None
    apart: bool = False
    test: Callable[[Any], tuple[bool, str]] | None = None


@dataclass(frozen=True)
class Plot:
    """One picture.

    Attributes:
      name: file name without ending.
      title: one line.
      measures: names, in order; a line goes through them from left to right.
      variants: names; () shows all that have one of the measures.
      kind: 'dots' (one row per variant and measure) or 'line' (one line per variant).
      breaks: positions before which a line is interrupted, e.g. where a round begins.
      labels: shown under the positions of a line; () shows the names of the measures.
    """

    name: str
    title: str
    measures: tuple[str, ...]
    variants: tuple[str, ...] = ()
    kind: str = "dots"
    breaks: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
      config: base config; every variant starts from a copy.
      variants: what is compared.
      seeds: loop seeds (`config.seed`); each variant is run with each.
      measures: columns of the result.
      baseline: variant that the others' paired differences refer to; '' for none.
      paper: the paper's numbers, by (variant, measure), as fractions for pass rates.
      expectations, plots: see their classes.
      name, preset, about: set by `load`: file name, preset, docstring.
    """

    config: ml_collections.ConfigDict
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    measures: tuple[Measure, ...]
    baseline: str = ""
    paper: Mapping[Point, float] = field(default_factory=dict)
    expectations: tuple[Expectation, ...] = ()
    plots: tuple[Plot, ...] = ()
    name: str = ""
    preset: str = ""
    about: str = ""


@dataclass(frozen=True)
class Planned:
    """One run of a study: a variant with a seed, its checked config and its directory."""

    variant: Variant
    seed: int
    config: ml_collections.ConfigDict
    workdir: Path

    @property
    def needs(self) -> tuple[str, ...]:
        """Variants whose run of this seed must be finished before."""
        values = self.variant.changes.values()
        return tuple(value.variant for value in values if isinstance(value, Other))


# --- files ----------------------------------------------------------------------------------------


def load(
    argument: str, seeds: Sequence[int] = (), changes: Mapping[str, Any] | None = None
) -> Study:
    """The study of 'FILE.py', 'FILE.py:PRESET' or 'NAME:PRESET'; its configs are checked by `runs`.

    Args:
      seeds: instead of the study's own.
      changes: dotted config path -> value, for every base config; a variant's own come later.

    Raises:
      UserError: no such file or preset, or the study is not consistent.
    """
    file, preset = existing(argument, "--study", "studies")
    try:
        module = load_module(Path(file))
    except Exception as error:
        raise explain(file, error) from None
    names = getattr(module, "PRESETS", ())
    if not names or not callable(getattr(module, "get_study", None)) or not module.__doc__:
        raise UserError(
            f"--study={file}: a study file has a docstring, a tuple PRESETS and get_study(preset); "
            "see configs/studies/table1.py"
        )
    preset = preset or names[0]
    if preset not in names:
        raise UserError(f"--study={argument}: preset {preset!r} is not one of {', '.join(names)}")
    try:
        study = module.get_study(preset)
    except Exception as error:
        raise explain(file, error) from None
    if not isinstance(study, Study):
        raise UserError(f"--study={file}: get_study must return an oel_jax.study.command.Study")
    study = replace(study, name=Path(file).stem, preset=preset, about=module.__doc__.strip())
    if seeds:
        study = replace(study, seeds=tuple(seeds))
    if changes:
        study = _changed(study, changes)
    _check(study)
    return study


def _changed(study: Study, changes: Mapping[str, Any]) -> Study:
    """The study with other base configs."""

    def other(config: ml_collections.ConfigDict | None) -> ml_collections.ConfigDict | None:
        return config and _with(config, changes)

    variants = tuple(replace(v, config=other(v.config)) for v in study.variants)
    return replace(study, config=_with(study.config, changes), variants=variants)


def _with(
    config: ml_collections.ConfigDict, changes: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    if "seed" in changes:
        raise UserError("config.seed is set by the study for each run; use --seeds")
    return with_fields(config, changes)


# --- checks ---------------------------------------------------------------------------------------


def _check(study: Study) -> None:
    """UserError if the parts of a study do not fit together."""
    where = f"study {study.name}"
    for what, parts in (
        ("variants", study.variants),
        ("measures", study.measures),
        ("expectations", study.expectations),
        ("plots", study.plots),
    ):
        names = [part.name for part in parts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{where}: two {what} have the name {twice[0]!r}; rename one")
    for part in (*study.variants, *study.plots):
        if not isinstance(part.name, str) or not _NAME.fullmatch(part.name):
            raise UserError(
                f"{where}: {part.name!r} is a name of a variant or plot and of a file; use up to "
                "64 lower-case letters, digits and _"
            )
    if not study.variants or not study.measures:
        raise UserError(f"{where}: it needs at least one variant and one measure")
    seeds = study.seeds
    if not seeds or any(type(s) is not int or s < 0 for s in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: seeds are {seeds!r}; give different integers of at least 0")
    _check_names(study, where)
    for measure in study.measures:
        _check_measure(measure, where)


def _check_names(study: Study, where: str) -> None:
    """Whatever names a variant or a measure must name one that exists."""
    variants = {variant.name for variant in study.variants}
    measures = {measure.name for measure in study.measures}

    def known(name: str, names: set[str], what: str) -> None:
        if name not in names:
            raise UserError(f"{where}: {what} {name!r} does not exist; there are {sorted(names)}")

    if study.baseline:
        known(study.baseline, variants, "baseline: variant")
    for variant in study.variants:
        for path, value in variant.changes.items():
            if isinstance(value, Other):
                known(value.variant, variants, f"variant {variant.name}, {path}: variant")
        if type(variant.seeds) is not int or variant.seeds < 0:
            raise UserError(
                f"{where}, variant {variant.name}: seeds is {variant.seeds!r}; give how many of "
                "the study's seeds it is run with, 0 for all"
            )
        if not variant.stages or not set(variant.stages) <= set(NAMES):
            raise UserError(
                f"{where}, variant {variant.name}: stages are {variant.stages!r}; choose from "
                f"{', '.join(NAMES)}"
            )
    points = [(point, "paper") for point in study.paper]
    for expected in study.expectations:
        sides = [side for side in (expected.higher, expected.lower) if side]
        if len(sides) != (0 if expected.test else 2):
            raise UserError(
                f"{where}, expectation {expected.name!r}: give either higher and lower, or test"
            )
        points += [(side, f"expectation {expected.name!r}") for side in sides]
    for (variant, measure), what in points:
        known(variant, variants, f"{what}: variant")
        known(measure, measures, f"{what}: measure")
    for plot in study.plots:
        if plot.kind not in ("dots", "line"):
            raise UserError(f"{where}, plot {plot.name}: kind is {plot.kind!r}; use dots or line")
        for measure in plot.measures:
            known(measure, measures, f"plot {plot.name}: measure")
        for variant in plot.variants:
            known(variant, variants, f"plot {plot.name}: variant")


def _check_measure(measure: Measure, where: str) -> None:
    start = measure.evaluation in ("start", "start_skills")
    right = bool(measure.evaluation) != bool(measure.stage)
    right &= type(measure.round) is int and (measure.round == 0 if start else measure.round >= 1)
    right &= not (measure.per_start and not measure.evaluation)
    right &= not measure.evaluation or bool(_NAME.fullmatch(measure.evaluation))
    right &= not measure.per_start or measure.value != "pass_rate"
    if not right:
        raise UserError(
            f"{where}, measure {measure.name!r}: give an evaluation (round 0 for 'start', from 1 "
            "for the others) or a stage of the metrics with a round from 1; per_start needs an "
            "evaluation and a value other than 'pass_rate'"
        )


def runs(study: Study, root: Path) -> list[Planned]:
    """All runs of a study in the order they are made, every config validated.

    Seed after seed, so that a study that was stopped has whole comparisons; within a seed a variant
    comes after those it names with `Other`.

    Raises:
      UserError: naming study, variant and field.
    """
    planned = []
    order = _ordered(study)
    for seed in study.seeds:
        for variant in order:
            if variant.seeds and seed not in study.seeds[: variant.seeds]:
                continue
            place = f"study {study.name}, variant {variant.name}"
            changes = {
                path: str(run_directory(root, value.variant, seed))
                if isinstance(value, Other)
                else value
                for path, value in variant.changes.items()
            }
            try:
                config = _with(variant.config or study.config, changes)
                config.seed = seed
                if is_chat(config):
                    refuse("game.name", None, "a game: a study compares pass rates")
                validate(config, games=environments.known(config.game))
                if config.extract.review:
                    why = "False in a study, whose runs wait for nobody and share their texts"
                    refuse("extract.review", True, why)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            planned.append(Planned(variant, seed, config, run_directory(root, variant.name, seed)))
    longest = max(run.config.rounds for run in planned)
    for measure in study.measures:
        if measure.round > longest:
            raise UserError(
                f"study {study.name}, measure {measure.name!r}: no variant has a round "
                f"{measure.round}; raise config.rounds or drop the measure"
            )
    return planned


def run_directory(root: Path, variant: str, seed: int) -> Path:
    """Where the run of a variant with a seed is in the workdir of a study."""
    return root / variant / f"seed_{seed}"


def _ordered(study: Study) -> list[Variant]:
    """Variants as in the study, but each after the ones it needs."""
    by_name = {variant.name: variant for variant in study.variants}
    order: dict[str, Variant] = {}

    def place(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            chain = " -> ".join((*above, name))
            raise UserError(f"study {study.name}: variants wait for each other: {chain}")
        if name not in order:
            for value in by_name[name].changes.values():
                if isinstance(value, Other):
                    place(value.variant, (*above, name))
            order[name] = by_name[name]

    for name in by_name:
        place(name, ())
    return list(order.values())
