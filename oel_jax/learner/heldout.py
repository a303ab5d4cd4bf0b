"""How far a policy is from the teacher on conversations that it has not learned from."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import ml_collections

from oel_jax.distill.packing import Sample, fill, plan
from oel_jax.distill.step import StepConfig, Sums, micro_loss
from oel_jax.learner.settings import step_settings
from oel_jax.learner.teacher import Teacher
from oel_jax.models.language_model import LanguageModel
from oel_jax.parallel.mesh import put_batch


class Divergence(NamedTuple):
    """Means over the tokens of some answers.

    Attributes:
      kl: KL(student || teacher) on the loss's support, at the loss's temperature, nats.
      loss: what a step would minimise, each token with the same weight.
      student_entropy, teacher_entropy: nats, on the same support.
      tokens: how many there are.
    """

    kl: float
    loss: float
    student_entropy: float
    teacher_entropy: float
    tokens: int


@partial(jax.jit, static_argnames=("step",))
def _measured(params, teacher, cache, batch, *, step: StepConfig) -> Sums:
    return micro_loss(params, teacher, cache, batch, step=step)[1]


def heldout_divergence(
    config: ml_collections.ConfigDict,
    student: LanguageModel,
    teacher: Teacher,
    samples: Sequence[Sample],
) -> Divergence:
    """The divergence of a policy's answers from the teacher, without a gradient.

    Args:
      student: on the same devices as the teacher.
      teacher: prepared.
      samples: at least one; the answers are the student's.
    """
    step = replace(
        step_settings(config, teacher.model.cfg),
        remat="none",
        retention="none",
        trust=0.0,
        lora=0.0,
    )
    mesh = teacher.model.mesh
    shape, batches = plan(samples, config.consolidate.token_budget, mesh.shape["fsdp"])
    total = None
    with jax.set_mesh(mesh):
        for text, rows in batches:
            batch = put_batch(mesh, fill(samples, [1.0] * len(samples), rows, shape))
            cache = teacher.prefix(text).cache
            sums = _measured(student.params, teacher.model.params, cache, batch, step=step)
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    total = jax.device_get(total)
    count = float(total.tokens)
    return Divergence(
        float(total.kl) / count,
        float(total.loss) / count,
        float(total.student_entropy) / count,
        float(total.teacher_entropy) / count,
        int(count),
    )
