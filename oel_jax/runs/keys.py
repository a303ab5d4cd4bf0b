"""Random keys of a run: each generation has one that depends on nothing but what it is for."""

import ml_collections
import numpy as np

from oel_jax.sampler.requests import request_key


def generation_key(config: ml_collections.ConfigDict, purpose: str, *parts: object) -> np.ndarray:
    """Key of one generation, uint32 [2]; depends on `config.seed` and on the arguments alone."""
    return request_key(config.seed, purpose, *parts)


def chain_key(
    config: ml_collections.ConfigDict, chain: int, purpose: str, *parts: object
) -> np.ndarray:
    """Key of a generation that belongs to a chain (evaluation, extraction), uint32 [2].

    With `evaluate.seed_mode='constant'` all requests of a chain share one noise stream, as the
    released code does (spec section 5).

    Args:
      chain: its index, from 0; its seed is 50 (chain + 1).
    """
    seed = 50 * (chain + 1)
    if config.evaluate.seed_mode == "constant":
        return generation_key(config, "constant", seed)
    return generation_key(config, purpose, seed, *parts)
