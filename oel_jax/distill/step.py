"""One optimizer step: gradients accumulated over micro-batches, then AdamW on float32 masters."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from oel_jax.distill.packing import MicroBatch, View
from oel_jax.distill.topk_kl import KLConfig, TokenStats, fused_topk_kl
from oel_jax.lm.config import ModelConfig
from oel_jax.lm.model import KeyValues, Params, Prefix, forward, head
from oel_jax.parallel.mesh import constrain, merge_rows


@dataclass(frozen=True)
class StepConfig:
    """Static settings of the jitted step.

    Attributes:
      model: shape of student and teacher.
      kl: the loss.
      dtype: compute dtype of the student; the teacher's weights are already in it.
      remat: what layers keep for the backward pass, one of `lm.model.REMAT`.
      block: query block of the attention.
    """

    model: ModelConfig
    kl: KLConfig
    dtype: Any
    remat: str
    block: int


class Sums(NamedTuple):
    """Sums over the response tokens of a step; divide by `tokens`."""

    loss: Float[Array, ""]  # already weighted: the loss itself
    tokens: Float[Array, ""]
    kl: Float[Array, ""]
    mass: Float[Array, ""]
    student_entropy: Float[Array, ""]
    teacher_entropy: Float[Array, ""]
    log_prob_gap: Float[Array, ""]  # |trainer - sampler| log-probability of the sampled token


def optimizer(section: Any) -> optax.GradientTransformation:
    """AdamW of a config's `consolidate` section: one group, constant rate, decay on all (8.6)."""
    return optax.adamw(
        section.learning_rate,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        weight_decay=section.weight_decay,
        mu_dtype=jnp.dtype(section.moments_dtype),
    )


@partial(jax.jit, static_argnames=("dtype",))
def cast(params: Params, dtype: Any) -> Params:
    """The parameters in another dtype, in the same places."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@jax.jit
def zeros_like(params: Params) -> Params:
    """Float32 zeros in the places of the parameters: where gradients are summed."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)


def _predicting(hidden: Float[Array, "B T D"], predict: Int[Array, "B R"]) -> Array:
    """Hidden states that predict the response tokens, [B * R, D]."""
    return merge_rows(jnp.take_along_axis(hidden, predict[:, :, None], axis=1))


def _hidden(step: StepConfig, params: Params, view: View, cache: KeyValues | None, remat: str):
    prefix = None if cache is None else Prefix(cache, view.shared)
    hidden = forward(
        step.model,
        params,
        view.tokens,
        view.positions,
        view.segments,
        prefix=prefix,
        remat=remat,
        block=step.block,
    )
    return _predicting(hidden, view.predict)


def micro_loss(
    params: Params, teacher: Params, cache: KeyValues, batch: MicroBatch, step: StepConfig
) -> tuple[Float[Array, ""], Sums]:
    """Weighted top-k reverse KL of one micro-batch, and its sums.

    The teacher reads its own prompt: the cached knowledge prefix, then suffix and response. Only
    `params` gets a gradient.
    """
    student = jax.tree.map(lambda leaf: leaf.astype(step.dtype), params)
    h_s = _hidden(step, student, batch.student, None, step.remat)
    h_t = jax.lax.stop_gradient(_hidden(step, teacher, batch.teacher, cache, "none"))
    loss, stats = fused_topk_kl(
        step.kl,
        h_s,
        constrain(head(step.model, student), "vocab", None),
        h_t,
        constrain(head(step.model, teacher), "vocab", None),
        merge_rows(batch.sampled),
        merge_rows(batch.weight),
    )
    return loss, _sums(loss, stats, merge_rows(batch.mask), merge_rows(batch.log_prob))


def _sums(loss: Array, stats: TokenStats, mask: Array, log_prob: Array) -> Sums:
    gap = jnp.abs(stats.log_prob - log_prob)
    return Sums(
        loss=loss,
        tokens=mask.sum(),
        kl=(stats.kl * mask).sum(),
        mass=(stats.mass * mask).sum(),
        student_entropy=(stats.student_entropy * mask).sum(),
        teacher_entropy=(stats.teacher_entropy * mask).sum(),
        log_prob_gap=(gap * mask).sum(),
    )


@partial(jax.jit, static_argnames=("step",), donate_argnames=("gradients",))
def accumulate(
    gradients: Params,
    params: Params,
    teacher: Params,
    cache: KeyValues,
    batch: MicroBatch,
    *,
    step: StepConfig,
) -> tuple[Params, Sums]:
    """Add the gradient of one micro-batch; `gradients` is donated."""
    (_, sums), new = jax.value_and_grad(micro_loss, has_aux=True)(
        params, teacher, cache, batch, step
    )
    return jax.tree.map(lambda old, add: old + add.astype(jnp.float32), gradients, new), sums


class Update(NamedTuple):
    """What an update did."""

    grad_norm: Float[Array, ""]  # before clipping
    skipped: Array  # bool: the norm was not finite, nothing changed


@partial(jax.jit, static_argnames=("tx", "clip_norm"), donate_argnums=(0, 1))
def update(
    params: Params, state: Any, gradients: Params, *, tx: Any, clip_norm: float
) -> tuple[Params, Any, Update]:
    """One AdamW step with global-norm clipping; a non-finite norm skips it (spec 8.6).

    params: float32 masters; donated, as is the optimizer's state.
    """
    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(norm)
    scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
    clipped = jax.tree.map(lambda g: jnp.where(finite, g * scale, 0.0), gradients)
    changes, new_state = tx.update(clipped, state, params)
    stepped = optax.apply_updates(params, changes)

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old)

    params = jax.tree.map(keep, stepped, params)
    state = jax.tree.map(keep, new_state, state)
    return params, state, Update(norm, ~finite)
