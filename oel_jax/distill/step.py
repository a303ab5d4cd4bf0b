"""One optimizer step: gradients accumulated over micro-batches, then AdamW on float32 masters.

More than the method's loss: a retention term, a teacher held near the student (trust region), and
how much knowledge moves the teacher, by which turns can be chosen."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from oel_jax.distill.lora import adapted
from oel_jax.distill.packing import MicroBatch, View
from oel_jax.distill.topk_kl import KLConfig, TokenStats, fused_topk_kl
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import CachedPrefix, KeyValues, Params, forward, output_matrix
from oel_jax.parallel.mesh import merge_rows
from oel_jax.parallel.offload import on_device


@dataclass(frozen=True)
class StepConfig:
    """Static settings of the jitted step.

    Attributes:
      model: shape of student and teacher.
      kl: the loss.
      dtype: compute dtype of the student; the teacher's weights are already in it.
      remat: what layers keep for the backward pass, one of `lm.model.REMAT`.
      block: query block of the attention.
      retention: 'none'; 'plain' adds KL(student || teacher), both without knowledge; 'knowledge'
        the same of both with knowledge, the student's prefix being a constant.
      retention_weight: factor of that term.
      trust: 0 = off; else the teacher's logits are (1 - trust) of the teacher's and trust of the
        student's own with knowledge, as a constant: the log-linear mixture that is nearest to
        both in reverse KL.
      lora: 0 = all weights are trained; else alpha / rank: the trained parameters are an adapter of
        the teacher's weights, see `distill.lora`.
    """

    model: ModelConfig
    kl: KLConfig
    dtype: Any
    remat: str
    block: int
    retention: str = "none"
    retention_weight: float = 0.0
    trust: float = 0.0
    lora: float = 0.0

    @property
    def own_view(self) -> bool:
        """Whether the student reads the knowledge too; `micro_loss` then needs its prefix."""
        return self.retention == "knowledge" or self.trust > 0

    @property
    def kept(self) -> KLConfig:
        """The divergence of the retention term: the method's, on the same support size."""
        return KLConfig(self.kl.top_k, self.kl.temperature, chunk=self.kl.chunk, pick=self.kl.pick)


class Sums(NamedTuple):
    """Sums over the response tokens of a step; divide by `tokens`."""

    loss: Float[Array, ""]  # already weighted: the loss itself
    tokens: Float[Array, ""]
    kl: Float[Array, ""]
    mass: Float[Array, ""]
    student_entropy: Float[Array, ""]
    teacher_entropy: Float[Array, ""]
    log_prob_gap: Float[Array, ""]  # |trainer - sampler| log-probability of the sampled token
    retention: Float[Array, ""]  # KL of the retention term; 0 without one
    kl_by_place: Float[Array, " places"]  # `kl` by place in the answer, see `PLACES`
    tokens_by_place: Float[Array, " places"]


PLACES = 32  # of a histogram: equal parts of the longest answer


@partial(jax.jit, static_argnames=("dtype",))
def cast(params: Params, dtype: Any) -> Params:
    """The parameters in another dtype, in the same places, but in device memory."""
    return jax.tree.map(lambda leaf: on_device(leaf).astype(dtype), params)


@jax.jit
def zeros_like(params: Params) -> Params:
    """Float32 zeros in the places of the parameters: where gradients are summed."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)


def _predicting(hidden: Float[Array, "B T D"], predict: Int[Array, "B R"]) -> Array:
    """Hidden states that predict the response tokens, [B * R, D]."""
    return merge_rows(jnp.take_along_axis(hidden, predict[:, :, None], axis=1))


def _hidden(step: StepConfig, params: Params, view: View, cache: KeyValues | None, remat: str):
    prefix = None if cache is None else CachedPrefix(cache, view.shared)
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
    params: Params,
    teacher: Params,
    cache: KeyValues,
    batch: MicroBatch,
    own: KeyValues | None = None,
    *,
    step: StepConfig,
) -> tuple[Float[Array, ""], Sums]:
    """Weighted top-k divergence of one micro-batch (and retention, if any), and its sums.

    The teacher reads its own prompt: the cached knowledge prefix, then suffix and response. Only
    `params` gets a gradient.

    Args:
      params: the student's float32 masters, or its adapter where `step.lora`.
      own: the knowledge prefix as the student encodes it, where `step.own_view`; a constant.
    """

    def student() -> Params:
        # Called for each use, so that the gradients of several uses meet in float32. The compiler
        # makes one copy.
        if step.lora:
            return adapted(teacher, params, step.lora, step.dtype)
        return jax.tree.map(lambda leaf: leaf.astype(step.dtype), params)

    stop = jax.lax.stop_gradient
    h_s = _hidden(step, student(), batch.student, None, step.remat)
    h_t = stop(_hidden(step, teacher, batch.teacher, cache, "none"))
    w_s, w_t = (output_matrix(step.model, side) for side in (student(), teacher))
    h_own = _hidden(step, student(), batch.teacher, own, step.remat) if step.own_view else None
    h_aim, w_aim = h_t, w_t
    if step.trust > 0:  # a mixture of logits is the sum of those of scaled hidden states
        h_aim = ((1 - step.trust) * h_t, step.trust * stop(h_own))
        w_aim = (w_t, stop(w_s))
    sampled, weight = merge_rows(batch.sampled), merge_rows(batch.weight)
    loss, stats = fused_topk_kl(step.kl, h_s, w_s, h_aim, w_aim, sampled, weight)
    kept = jnp.zeros_like(stats.kl)
    if step.retention != "none":
        if step.retention == "plain":
            seen, base = h_s, stop(_hidden(step, teacher, batch.student, None, "none"))
        else:
            seen, base = h_own, h_t
        term, kept_stats = fused_topk_kl(step.kept, seen, w_s, base, w_t, sampled, weight)
        loss, kept = loss + step.retention_weight * term, kept_stats.kl
    return loss, _sums(loss, stats, kept, batch)


def _sums(loss: Array, stats: TokenStats, kept: Array, batch: MicroBatch) -> Sums:
    mask, place = merge_rows(batch.mask), merge_rows(batch.place)
    # Padding counts nothing, whatever its hidden states are: 0 x NaN would be NaN.
    stats, kept = jax.tree.map(lambda x: jnp.where(mask > 0, x, 0.0), (stats, kept))
    gap = jnp.abs(stats.log_prob - merge_rows(batch.log_prob))
    here = jax.nn.one_hot(place, PLACES) * mask[:, None]
    return Sums(
        loss=loss,
        tokens=mask.sum(),
        kl=(stats.kl * mask).sum(),
        mass=(stats.mass * mask).sum(),
        student_entropy=(stats.student_entropy * mask).sum(),
        teacher_entropy=(stats.teacher_entropy * mask).sum(),
        log_prob_gap=(gap * mask).sum(),
        retention=(kept * mask).sum(),
        kl_by_place=(here * stats.kl[:, None]).sum(0),
        tokens_by_place=here.sum(0),
    )


@partial(jax.jit, static_argnames=("step",))
def sensitivity(
    teacher: Params, cache: KeyValues, batch: MicroBatch, *, step: StepConfig
) -> Float[Array, " M"]:
    """How much knowledge moves the teacher: JSD of its predictions with and without, per token.

    Over the whole vocabulary, at the loss's temperature, in nats; M = B * R as `batch.mask`.
    """
    with_it = _hidden(step, teacher, batch.teacher, cache, "none")
    without = _hidden(step, teacher, batch.student, None, "none")
    matrix = output_matrix(step.model, teacher)
    jsd = KLConfig(1, step.kl.temperature, "jsd", "full", chunk=step.kl.chunk)
    sampled, weight = merge_rows(batch.sampled), merge_rows(batch.weight)
    return fused_topk_kl(jsd, without, matrix, with_it, matrix, sampled, weight)[1].kl


@partial(jax.jit, static_argnames=("step",), donate_argnames=("gradients",))
def accumulate(
    gradients: Params,
    params: Params,
    teacher: Params,
    cache: KeyValues,
    batch: MicroBatch,
    own: KeyValues | None = None,
    *,
    step: StepConfig,
) -> tuple[Params, Sums]:
    """Add the gradient of one micro-batch, see `micro_loss`; `gradients` is donated."""
    (_, sums), new = jax.value_and_grad(micro_loss, has_aux=True)(
        params, teacher, cache, batch, own, step=step
    )
    return jax.tree.map(lambda old, add: old + add.astype(jnp.float32), gradients, new), sums


@partial(jax.jit, static_argnames=("rate",), donate_argnames=("average",))
def averaged(average: Params, params: Params, *, rate: float) -> Params:
    """(1 - rate) * average + rate * params, float32; `average` is donated."""
    return jax.tree.map(lambda old, new: old + rate * (new - old), average, params)


class Update(NamedTuple):
    """What an update did."""

    grad_norm: Float[Array, ""]  # before clipping
    skipped: Array  # bool: the norm was not finite, nothing changed


@partial(jax.jit, static_argnames=("tx", "clip_norm"), donate_argnums=(0, 1))
def update(
    params: Params,
    state: Any,
    gradients: Params,
    *,
    tx: optax.GradientTransformationExtraArgs,
    clip_norm: float,
) -> tuple[Params, Any, Update]:
    """One AdamW step with global-norm clipping; a non-finite norm skips it (spec 8.6).

    params: float32 masters; donated, as is the optimizer's state. What of the state is in host
    memory is read from there and goes back there.
    """
    with jax.named_scope("optimizer"):
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm)
        scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
        clipped = jax.tree.map(lambda g: jnp.where(finite, g * scale, 0.0), gradients)
        changes, state = tx.update(clipped, state, params, finite=finite)
        return optax.apply_updates(params, changes), state, Update(norm, ~finite)
