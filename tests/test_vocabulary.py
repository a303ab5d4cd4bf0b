"""Top-k over blocks equals `jax.lax.top_k` to the last tie."""

import jax
import numpy as np
import pytest

from oel_jax.parallel import vocabulary


def rows(kind, width):
    draw = np.random.default_rng(width)
    z = draw.normal(size=(6, width)).astype(np.float32)
    if kind == "ties":
        return np.round(z)  # a handful of values: nearly everything ties
    if kind == "limited":
        z[:, width // 3 :] = -np.inf  # ids that may not be sampled; fewer than k are left
    if kind == "crowded":
        z[:, 5:45] += 100.0  # all of them in few blocks
    return z


@pytest.mark.parametrize("kind", ["plain", "ties", "limited", "crowded"])
@pytest.mark.parametrize(("width", "k", "block"), [(640, 20, 8), (1001, 12, 16), (96, 40, 2)])
def test_blocks_equal_the_plain_top_k(kind, width, k, block):
    z = rows(kind, width)
    for found in (vocabulary.block_top_k(z, k, block), vocabulary.top_k(z, k, None)):
        for ours, expected in zip(found, jax.lax.top_k(z, k), strict=True):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("kind", ["plain", "ties"])
def test_the_largest_is_the_first_of_the_equal_ones(kind):
    z = rows(kind, 500)
    np.testing.assert_array_equal(vocabulary.argmax(z, None), z.argmax(-1))


def test_a_wide_vocabulary_is_sorted_in_blocks():
    """No sort of the whole row: that is what costs on an accelerator."""

    def widths(function):
        text = jax.jit(function).lower(np.zeros((2, 32_768), np.float32)).as_text()
        return "chlo.top_k" in text, f"tensor<2x{32_768}xf32>" in text.split("top_k")[1][:200]

    assert widths(lambda z: jax.lax.top_k(z, 64)) == (True, True)
    assert widths(lambda z: vocabulary.top_k(z, 64, None)) == (True, False)
