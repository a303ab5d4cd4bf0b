"""The loss of spec 8.3 written down plainly; what the fused kernel is tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def topk_reverse_kl(
    student: Float[Array, "M V"],
    teacher: Float[Array, "M V"],
    *,
    top_k: int,
    temperature: float,
    renorm: bool = False,
) -> Float[Array, " M"]:
    """Per-token sum over the student's top-k of p_s (log p_s - log p_t), float32.

    Both softmaxes run over the full vocabulary at `temperature`. The ids and the teacher carry no
    gradient. `renorm` renormalises both sides over the support first.
    """
    ls = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    lt = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    ids = jax.lax.top_k(jax.lax.stop_gradient(ls), top_k)[1]
    ls = jnp.take_along_axis(ls, ids, axis=-1)
    lt = jax.lax.stop_gradient(jnp.take_along_axis(lt, ids, axis=-1))
    if renorm:
        ls = jax.nn.log_softmax(ls)
        lt = jax.nn.log_softmax(lt)
    return jnp.sum(jnp.exp(ls) * (ls - lt), axis=-1)
