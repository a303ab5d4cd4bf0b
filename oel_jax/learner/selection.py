"""Which turns of a step are learned from: those where knowledge moves the teacher most.

A source of the method's collapse over many rounds is said to be the many turns where knowledge has
nothing to say; there the loss only carries noise (../shared/design/peers.md, ReSAIL).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from oel_jax.distill.packing import Sample, fill, plan
from oel_jax.distill.step import StepConfig, sensitivity
from oel_jax.learner.teacher import Teacher
from oel_jax.parallel.lookout import Lookout
from oel_jax.parallel.mesh import put_batch


def moved(
    samples: Sequence[Sample],
    teacher: Teacher,
    step: StepConfig,
    token_budget: int,
    mesh: Any,
    lookout: Lookout | None = None,
) -> Float[np.ndarray, " N"]:
    """Mean over a sample's response tokens of how far knowledge moves the teacher (JSD, nats)."""
    shape, batches = plan(samples, token_budget, mesh.shape["fsdp"])
    scores = np.zeros(len(samples), np.float64)
    for text, rows in batches:
        batch = fill(samples, [1.0] * len(samples), rows, shape)
        cache = teacher.prefix(text).cache
        jsd = sensitivity(teacher.model.params, cache, put_batch(mesh, batch), step=step)
        if lookout is not None:
            lookout.after(jsd)
        jsd = np.asarray(jax.device_get(jsd), np.float64).reshape(batch.mask.shape)
        for r, row in enumerate(rows):
            start = 0
            for index in row:
                end = start + len(samples[index].response)
                scores[index] = jsd[r, start:end].mean()
                start = end
    return scores


def selected(scores: Float[np.ndarray, " N"], fraction: float, floor: float = 0.0) -> list[int]:
    """Indices, in order, of the `fraction` of samples (at least one) with the highest scores.

    Of equal scores the first ones are taken; those below `floor` are left out, maybe all of them.
    """
    count = max(1, int(np.ceil(fraction * len(scores) - 1e-9)))
    best = np.argsort(-scores, kind="stable")[:count]
    return sorted(best[scores[best] >= floor].tolist())
