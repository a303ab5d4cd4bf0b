"""What the device can do, measured here and now, and what a piece of work needs at least."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import abstract_params


class Rates(NamedTuple):
    """Of one device, the best of several tries of a large product and a large copy."""

    flops: float  # per second
    bytes: float  # read and written, per second


def rates(dtype=jnp.float32) -> Rates:
    """Measure the device that JAX uses."""
    large = jax.default_backend() != "cpu"
    side, count = (8192, 1 << 28) if large else (2048, 1 << 26)
    square = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    vector = jnp.ones(count, jnp.float32)
    add = jax.jit(lambda a: a + 1.0)
    return Rates(2 * side**3 / _best(product, square), 8 * count / _best(add, vector))


def _best(function: Callable, argument: jax.Array, tries: int = 5) -> float:
    jax.block_until_ready(function(argument))
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        jax.block_until_ready(function(argument))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def parameters(cfg: ModelConfig) -> int:
    """All parameters, the embedding counted once."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(cfg)))


def token_flops(cfg: ModelConfig, context: float) -> float:
    """FLOPs of one token through the layers, forward, with `context` positions to attend to."""
    embedding = cfg.vocab_size * cfg.hidden_size * (1 if cfg.tie_embeddings else 2)
    attention = 4 * cfg.num_layers * cfg.num_heads * cfg.head_dim * context
    return 2 * (parameters(cfg) - embedding) + attention


def head_flops(cfg: ModelConfig) -> float:
    """FLOPs of one token's logits."""
    return 2 * cfg.vocab_size * cfg.hidden_size


def position_bytes(cfg: ModelConfig, itemsize: int) -> int:
    """Keys and values of one position in all layers."""
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * itemsize
