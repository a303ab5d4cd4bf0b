"""Vocabularies over devices against one device; top-k over blocks against `jax.lax.top_k`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from tiers import meshes

from oel_jax.parallel import vocabulary
from oel_jax.parallel.mesh import all_rows, make_mesh
from oel_jax.parallel.vocabulary import AT_REST, SPREAD, lookup
from oel_jax.sampler.requests import Sampling, request_key
from oel_jax.sampler.sampling import RowSampling, draw, sample

MESHES = meshes((2, 4), (8, 1), (4, 2), (1, 8))


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
    for found in (vocabulary.block_top_k(z, k, block), vocabulary.top_k(z, k)):
        for ours, expected in zip(found, jax.lax.top_k(z, k), strict=True):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("kind", ["plain", "ties"])
def test_the_largest_is_the_first_of_the_equal_ones(kind):
    z = rows(kind, 500)
    np.testing.assert_array_equal(vocabulary.argmax(z), z.argmax(-1))


def test_a_wide_vocabulary_is_sorted_in_blocks():
    """No sort of the whole row, which costs much on an accelerator."""

    def widths(function):
        text = jax.jit(function).lower(np.zeros((2, 32_768), np.float32)).as_text()
        return "chlo.top_k" in text, f"tensor<2x{32_768}xf32>" in text.split("top_k")[1][:200]

    assert widths(lambda z: jax.lax.top_k(z, 64)) == (True, True)
    assert widths(lambda z: vocabulary.top_k(z, 64)) == (True, False)


# --- on devices -----------------------------------------------------------------------------------

WIDTH = 16


def put(mesh, x, where):
    return jax.device_put(x, jax.NamedSharding(mesh, where))


def matrix_of(size):
    return np.random.default_rng(size).normal(size=(size, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("size", [64, 88, 8])  # 8 devices divide it; do not; a row each or none
def test_a_matrix_is_spread_and_comes_back(shape, size):
    mesh, matrix = make_mesh(*shape), matrix_of(size)
    with jax.set_mesh(mesh):
        rest = put(mesh, matrix, AT_REST)
        wide = vocabulary.spread_over_all(rest)
        back = jax.shard_map(
            lambda x: vocabulary.unspread(x, size // shape[1]),
            in_specs=SPREAD,
            out_specs=AT_REST,
            check_vma=False,
        )(wide)
    np.testing.assert_array_equal(back, matrix)
    assert wide.sharding.shard_shape(wide.shape) == (-(-size // shape[1] // shape[0]), WIDTH)
    kept = np.asarray(wide)
    np.testing.assert_array_equal(kept[np.abs(kept).sum(1) > 0], matrix)  # in order; zeros between


@pytest.mark.parametrize("shape", MESHES)
def test_rows_of_logits_are_whole_and_their_gradient_goes_back(shape):
    mesh, matrix = make_mesh(*shape), matrix_of(88)
    hidden = np.random.default_rng(1).normal(size=(16, WIDTH)).astype(np.float32)
    change = np.random.default_rng(2).normal(size=(16, 88)).astype(np.float32)

    def local(hidden, wide, change):
        everyone = all_rows(hidden)
        z = vocabulary.whole_rows(vocabulary.logits(everyone, wide), 88)
        part = vocabulary.slices_of_rows(vocabulary.my_rows(change))
        d_hidden = vocabulary.summed_rows(part @ wide)
        return vocabulary.joined_rows(z), d_hidden, part.T @ everyone

    rows = P("fsdp", None)
    with jax.set_mesh(mesh):
        wide = vocabulary.spread_over_all(put(mesh, matrix, AT_REST))
        run = jax.shard_map(
            local, in_specs=(rows, SPREAD, rows), out_specs=(rows, rows, SPREAD), check_vma=False
        )
        z, d_hidden, d_matrix = jax.jit(run)(put(mesh, hidden, rows), wide, put(mesh, change, rows))
    np.testing.assert_allclose(z, hidden @ matrix.T, atol=1e-5)
    np.testing.assert_allclose(d_hidden, change @ matrix, atol=1e-4)
    real = np.abs(np.asarray(wide)).sum(1) > 0
    np.testing.assert_allclose(np.asarray(d_matrix)[real], change.T @ hidden, atol=1e-4)
    assert not np.asarray(d_matrix)[~real].any()  # nothing is learned about ids that do not exist


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize(
    "how", [Sampling(0.7), Sampling(0.7, 20, 0.8), Sampling(1.0, 0, 0.6), Sampling(0.0)]
)
def test_a_draw_on_devices_is_that_of_one(shape, how):
    """88 ids, of which the last three are never sampled; zero padding would win among negatives."""
    mesh, matrix = make_mesh(*shape), np.abs(matrix_of(88))
    hidden = -np.abs(np.random.default_rng(1).normal(size=(24, WIDTH))).astype(np.float32)
    keys = np.stack([request_key("draw", index) for index in range(24)])
    count = np.arange(24, dtype=np.int32)
    logits = jnp.asarray(hidden) @ matrix.T
    assert logits.max() < 0
    widths = (how.candidates(88),)
    expected = sample(RowSampling.of([how] * 24, 88), widths, 85, logits, keys, count)
    rows, wide = P("fsdp"), P("fsdp", None)
    with jax.set_mesh(mesh):
        spread = vocabulary.spread_over_all(put(mesh, matrix, AT_REST))
        run = jax.jit(draw, static_argnums=(1, 2, 5))
        settings = jax.tree.map(lambda leaf: put(mesh, leaf, rows), RowSampling.of([how] * 24, 88))
        found = run(
            settings,
            widths,
            85,
            put(mesh, hidden, wide),
            spread,
            88,
            put(mesh, keys, wide),
            put(mesh, count, rows),
        )
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
    drawn = np.asarray(found[0])
    assert len(np.unique(drawn)) > 3 and drawn.max() < 85


@pytest.mark.parametrize("shape", MESHES)
def test_an_embedding_and_its_gradient_equal_one_devices(shape):
    """Ids that come up many times, and one beyond the vocabulary, which reads the last row."""
    mesh, table = make_mesh(*shape), matrix_of(88)
    ids = np.random.default_rng(3).integers(0, 88, (16, 5)).astype(np.int32)
    ids[:, 0], ids[3, 1] = 7, 88
    scale = np.random.default_rng(4).normal(size=(16, 5, WIDTH)).astype(np.float32)

    def loss(table, ids, scale):
        return jnp.sum(lookup(table, ids) * scale), lookup(table, ids)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, plain), gradient = run(table, ids, scale)
    np.testing.assert_array_equal(plain, table[np.minimum(ids, 87)])
    with jax.set_mesh(mesh):
        (_, split), on_mesh = run(
            put(mesh, table, AT_REST),
            put(mesh, ids, P("fsdp", None)),
            put(mesh, scale, P("fsdp", None, None)),
        )
    np.testing.assert_array_equal(split, plain)
    np.testing.assert_allclose(on_mesh, gradient, atol=1e-5)
    assert jax.typeof(on_mesh).sharding.spec == AT_REST and np.abs(gradient[7]).max() > 1
