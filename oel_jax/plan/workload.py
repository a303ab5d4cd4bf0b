"""What a config asks of the devices: samplers, micro-batches, and how much of everything a round.

Sizes follow from the config alone, at their caps: a plan must hold for the longest texts. Amounts
need assumptions about games that nobody has played yet; they are in `Assumptions`, and flags of the
command change them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import ml_collections
import numpy as np

from oel_jax.config.budgets import has_extractor, play_budget
from oel_jax.config.choices import PER_TURN
from oel_jax.distill.packing import Sample, Shape, plan
from oel_jax.models.lengths import SHARED_FROM, padded_length
from oel_jax.runs.samplers import (
    coach_layout,
    extraction_layout,
    extraction_width,
    play_layout,
)
from oel_jax.sampler.config import SamplerConfig


@dataclass(frozen=True)
class Layout:
    """Where a run's arrays are.

    Attributes:
      mesh: axes ('fsdp', 'tp'), all devices: where is trained.
      host: the devices of one process: where games are played and texts are written.
      processes: how many of these there are.
    """

    mesh: jax.sharding.Mesh
    host: jax.sharding.Mesh
    processes: int

    @property
    def fsdp(self) -> int:
        return self.mesh.shape["fsdp"]

    @property
    def tp(self) -> int:
        return self.mesh.shape["tp"]


@dataclass(frozen=True)
class Assumptions:
    """What a config does not say. Each field is a flag of the command.

    Attributes:
      turns: of a game, on average.
      answer_tokens: of an answer in a game, on average.
      turn_tokens: of what the game says in a turn, on average.
      extract_tokens: of an extractor's answer, on average.
      header_tokens: that all prompts of a game begin with, at most.
      occupancy: share of the sampler's slots and rows that are in use, on average.
      compute, memory, network: share of the device's peaks that is reached.
    """

    turns: float = 4.0
    answer_tokens: float = 300.0
    turn_tokens: float = 120.0
    extract_tokens: float = 1500.0
    header_tokens: int = 256
    occupancy: float = 0.8
    compute: float = 0.4
    memory: float = 0.7
    network: float = 0.5

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, **given: float | None) -> "Assumptions":
        """The defaults for a config, with what is given in their place.

        The tokens of an answer are those of the paper's models on these games (spec 14.2): 640 with
        a thought, 300 without.
        """
        values: dict[str, Any] = {
            "answer_tokens": 640.0 if config.model.thinking else 300.0,
        }
        values |= {name: value for name, value in given.items() if value is not None}
        found = cls(**values)
        return cls(
            **vars(found)
            | {
                "answer_tokens": min(found.answer_tokens, config.sampler.max_response),
                "extract_tokens": min(found.extract_tokens, config.extract.l_max),
            }
        )


@dataclass(frozen=True)
class Workload:
    """All sizes of a run on one mesh.

    Attributes:
      play: games without knowledge, the student's answers among them.
      informed: games with knowledge in the prompt; None if none are played.
      extractor: None if no model writes the texts.
      knowledge: tokens that an encoded text is padded to.
      texts: how many are held while consolidating.
      widest: the micro-batch of answers and prompts at their caps: what must fit.
      usual: the micro-batch of average answers: what time is counted for.
      batches: micro-batches of a step, on average.
      filled: share of the tokens of these micro-batches that are not padding.
    """

    play: SamplerConfig
    informed: SamplerConfig | None
    extractor: SamplerConfig | None
    knowledge: int
    texts: int
    widest: Shape
    usual: Shape
    batches: int
    filled: float


def samplers(
    config: ml_collections.ConfigDict, layout: Layout, header: int
) -> tuple[SamplerConfig, SamplerConfig | None, SamplerConfig | None]:
    """The samplers of one process: of play, of play with knowledge, and of the extractor.

    Args:
      header: tokens that all prompts of a game begin with.
    """
    fsdp, e = layout.host.shape["fsdp"], config.extract
    play = play_layout(
        config, fsdp, informed=False, texts=1, shared=header if header >= SHARED_FROM else 0
    )
    informed = extractor = None
    texts = e.chains if e.experience in ("knowledge", "raw") else 0
    if texts and (config.evaluate.in_context or config.evaluate.curve or config.preflight.games):
        informed = play_layout(config, fsdp, informed=True, texts=texts, shared=header + e.l_max)
    if has_extractor(config):
        per_chain = partial(extraction_layout, chains=-(-e.chains // layout.processes))
        extractor = (coach_layout if e.experience == "coach" else per_chain)(config, fsdp)
    return play, informed, extractor


def _samples(games: int, turns: float, prompt: int, suffix: int, response: int, texts: int):
    """A step's samples of one length each; only lengths matter to the packing."""
    count = max(1, round(games * turns))
    none = np.zeros(0, np.float32)
    return [
        Sample(range(prompt), range(suffix), 0, range(response), none, index % max(texts, 1))
        for index in range(count)
    ]


def workload(
    config: ml_collections.ConfigDict, layout: Layout, assumed: Assumptions, knowledge: int = 0
) -> Workload:
    """Sizes of a run of this config.

    Args:
      knowledge: tokens of the longest knowledge text with the prompt around it; 0 = its cap.
    """
    fsdp = layout.fsdp
    play, informed, extractor = samplers(config, layout, assumed.header_tokens)
    own = config.extract.experience in PER_TURN
    texts = 0 if own else config.extract.chains
    more = config.extract.l_max if own else 0
    games, budget = config.deploy.games_per_step, config.consolidate.token_budget
    prompt, response = play_budget(config, False)
    longest = _samples(games, assumed.turns, prompt, prompt + more, response, texts)
    widest, _ = plan(longest, budget, fsdp)
    # What the prompt of an average turn holds: the header, and the turns before it.
    before = (assumed.turns - 1) / 2 * (assumed.turn_tokens + assumed.answer_tokens)
    mean = round(min(prompt, assumed.header_tokens + before + assumed.turn_tokens))
    answer = max(1, round(assumed.answer_tokens))
    some = _samples(games, assumed.turns, mean, mean + more, answer, texts)
    usual, batches = plan(some, budget, fsdp)
    read = sum(sample.student_length for sample in some)
    return Workload(
        play=play,
        informed=informed,
        extractor=extractor,
        knowledge=padded_length(
            knowledge or (config.extract.l_max if texts else 0) + assumed.header_tokens, 64
        ),
        texts=max(config.extract.chains, 1),
        widest=widest,
        usual=usual,
        batches=len(batches),
        filled=read / (len(batches) * usual.rows * usual.tokens),
    )


@dataclass(frozen=True)
class Amounts:
    """Answers and calls of one round."""

    deploy: float
    informed: float
    plain: float
    rollouts: float
    extractor_calls: int
    extractor_waves: int


def amounts(config: ml_collections.ConfigDict, assumed: Assumptions) -> Amounts:
    """How many answers each stage of a round asks for.

    `plain` are those of evaluation and pre-flight without knowledge, `informed` with it; `deploy`
    includes the games of `demonstrate`. The evaluation of the starting model is not in a round.
    """
    e, t, v = config.extract, config.consolidate, config.evaluate
    chains = 1 if e.trajectories == "shared" else e.chains
    trained = t.steps * config.deploy.games_per_step
    off_policy = t.mode != "on_policy"
    held_out = v.maps * v.seeds
    with_text = int(e.experience != "none" and v.in_context) + len(v.curve)
    plain = held_out * (1 + len(v.steps))
    calls, width = e.chains * e.n_run if has_extractor(config) else 0, extraction_width(config)
    waves, tried = -(-e.n_run // width) if calls else 0, config.preflight.games
    if e.experience == "coach":  # one call for each answer, and never an empty slot
        calls = round(assumed.turns * trained)
        waves = -(-calls // config.sampler.slots)
    if e.experience in PER_TURN:  # no text to play with
        tried = 0
    return Amounts(
        deploy=assumed.turns * (chains * e.n_run + trained * (2 if off_policy else 1)),
        informed=assumed.turns * (held_out * with_text + tried * e.chains),
        plain=assumed.turns * (plain + tried),
        rollouts=0.0 if off_policy else assumed.turns * trained,
        extractor_calls=calls,
        extractor_waves=waves,
    )
