"""Rotary position embedding; the frequencies come from `ModelConfig.inverse_frequencies`."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oel_jax.models.config import ModelConfig


def cos_sin(
    cfg: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosine and sine tables in float32; the unit axis broadcasts over heads."""
    angles = positions[:, :, None].astype(jnp.float32) * cfg.inverse_frequencies()
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2), the Hugging Face convention; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
