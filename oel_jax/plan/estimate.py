"""From programs to hours: what fits, what limits each program, and what a round takes.

An estimate from peaks and assumed shares of them (`workload.Assumptions`), not a measurement.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from oel_jax.config.budgets import shows_previous
from oel_jax.models.lengths import padded_length
from oel_jax.plan.costs import Cost, cost, rough_temporaries
from oel_jax.plan.measure import Compiled
from oel_jax.plan.programs import Arrays, Program, living, programs
from oel_jax.plan.targets import Target
from oel_jax.plan.workload import Amounts, Assumptions, amounts
from oel_jax.sampler.config import SamplerConfig


@dataclass(frozen=True)
class Time:
    """Seconds of one run of a program, and what they are spent on mostly."""

    seconds: float
    bound: str


@dataclass(frozen=True)
class Stage:
    """What lives on one device in a stage.

    Attributes:
      name: one of `programs.STAGES`.
      held: bytes by class.
      hungriest: the program with the largest temporaries.
      temporaries: its bytes.
    """

    name: str
    held: dict[str, int]
    hungriest: str
    temporaries: int

    @property
    def total(self) -> int:
        return sum(self.held.values()) + self.temporaries


@dataclass(frozen=True)
class Plan:
    """A config on a target.

    Attributes:
      arrays: config, shapes and mesh.
      programs: by name.
      compiled: by name; empty if nothing was compiled.
    """

    target: Target
    arrays: Arrays
    assumed: Assumptions
    programs: dict[str, Program]
    compiled: Mapping[str, Compiled] = field(default_factory=dict)

    @property
    def by_hand(self) -> "Plan":
        """The same without the compiler's word."""
        return replace(self, compiled={})

    @cached_property
    def costs(self) -> dict[str, Cost]:
        found = {name: cost(program, self.arrays) for name, program in self.programs.items()}
        for name, one in self.compiled.items():
            if not one.too_large:
                found[name] = replace(found[name], sent=float(one.received))
        return found

    @cached_property
    def times(self) -> dict[str, Time]:
        return {name: self.time(one, self.programs[name]) for name, one in self.costs.items()}

    def time(self, one: Cost, program: Program) -> Time:
        """The slowest of computing, memory and network; they are taken to overlap."""
        device, share = self.target.device, self.assumed
        alone = program.mesh is self.arrays.layout.host  # it does not leave its node
        parts = {
            "compute": one.flops / (device.flops * share.compute),
            "memory": one.bytes / (device.bandwidth * share.memory),
            "network": one.sent / ((device.link if alone else self.target.link) * share.network),
        }
        bound = max(parts, key=parts.get)
        return Time(parts[bound], bound)

    @cached_property
    def stages(self) -> list[Stage]:
        found = []
        for name, held in living(self.arrays).items():
            own = [one for one in self.programs.values() if one.stage == name]
            needs = {one.name: self._temporaries(one) for one in own}
            hungriest = max(needs, key=needs.get) if needs else ""
            found.append(Stage(name, held, hungriest, needs.get(hungriest, 0)))
        return found

    def _temporaries(self, program: Program) -> int:
        batch = program.bytes.get("batch", 0)
        if program.name not in self.compiled:
            return rough_temporaries(program, self.arrays) + batch
        one = self.compiled[program.name]
        made = 0 if program.name == "cast" else one.outputs  # the copy is counted where it is used
        return one.temporaries + made + batch

    @property
    def too_large(self) -> dict[str, str]:
        """Programs that the compiler refused for lack of memory, with its words."""
        return {name: one.too_large for name, one in self.compiled.items() if one.too_large}

    @property
    def most(self) -> Stage:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def margin(self) -> float:
        """Share of the device's memory that is left at the worst moment; negative: too much."""
        return 1 - self.most.total / self.target.device.memory

    @property
    def fits(self) -> bool:
        return not self.too_large and self.margin >= 0

    @cached_property
    def hours(self) -> dict[str, float]:
        """Stage of a round -> hours."""
        return {name: seconds / 3600 for name, seconds in _seconds(self).items()}


def planned(target: Target, arrays: Arrays, assumed: Assumptions) -> Plan:
    """A plan without compiling."""
    return Plan(target, arrays, assumed, {one.name: one for one in programs(arrays)})


def _seconds(plan: Plan) -> dict[str, float]:
    """Seconds of each stage of a round."""
    config, work, a = plan.arrays.config, plan.arrays.work, plan.assumed
    amount = amounts(config, a)
    before = (a.turns - 1) / 2 * (a.turn_tokens + a.answer_tokens)
    found = {"deploy": _answers(plan, "play", work.play, amount.deploy, a.turn_tokens)}
    if amount.extractor_calls:
        found["extract"] = _extraction(plan, work.extractor, amount)
    steps = config.consolidate.steps
    fresh = before + a.turn_tokens  # a prefix of a game is read anew, after the header
    rollouts = _answers(plan, "rollouts", work.play, amount.rollouts, fresh)
    found["consolidate: answers"] = rollouts + steps * _one(plan, "cast")
    micro = "micro-batch, usual" if "micro-batch, usual" in plan.programs else "micro-batch"
    each = work.batches * (_one(plan, micro) + _one(plan, "choice of turns"))
    found["consolidate: updates"] = steps * (each + _one(plan, "update"))
    found["evaluate"] = _answers(plan, "play", work.play, amount.plain, a.turn_tokens)
    if work.informed:
        found["evaluate"] += _answers(
            plan, "play with knowledge", work.informed, amount.informed, a.turn_tokens
        )
    return found


def _one(plan: Plan, name: str) -> float:
    return plan.times[name].seconds if name in plan.programs else 0.0


def _again(plan: Plan, name: str, tokens: float) -> float:
    """Seconds of a prefill with pieces of another length than it was compiled for."""
    program = plan.programs[name]
    rows, chunk, keys = program.sizes
    size = min(chunk, padded_length(max(1, math.ceil(tokens))))
    other = cost(replace(program, sizes=(rows, size, keys)), plan.arrays)
    sent = plan.costs[name].sent  # mostly weights, whatever the length
    return plan.time(replace(other, sent=sent), program).seconds * math.ceil(tokens / chunk)


def _answers(plan: Plan, stage: str, s: SamplerConfig, count: float, prompt: float) -> float:
    """Seconds for so many answers to prompts with so many new tokens, shared by all processes."""
    if not count:
        return 0.0
    a, mine = plan.assumed, count / plan.target.processes
    prefill = mine / (s.prefill_rows * a.occupancy) * _again(plan, f"prefill, {stage}", prompt)
    steps = max(a.answer_tokens, mine * a.answer_tokens / (s.slots * a.occupancy))
    return prefill + steps * _one(plan, f"decode, {stage}") / (1 + s.draft)


def _extraction(plan: Plan, s: SamplerConfig, amount: Amounts) -> float:
    """Chains grow in lock-step: each wave waits for its longest answer."""
    a, config = plan.assumed, plan.arrays.config
    calls = amount.extractor_calls / amount.extractor_waves / plan.target.processes
    prompt = a.turns * (a.turn_tokens + a.answer_tokens) + 1024
    prompt += config.extract.l_max / 2 if shows_previous(config) else 0
    prefill = math.ceil(calls / s.prefill_rows) * _again(plan, "prefill, extract", prompt)
    return amount.extractor_waves * (prefill + a.extract_tokens * _one(plan, "decode, extract"))
