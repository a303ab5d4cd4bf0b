"""Streamed attention against plain attention: values, gradients, tiles, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import meshes

from oel_jax.models import attention as module
from oel_jax.models.attention import attention
from oel_jax.parallel.mesh import make_mesh, spec

B, T, N, K, H, PREFIX = 4, 50, 6, 2, 8, 37


def inputs(seed=0, b=B, t=T, n=N, kv=K):
    """Packed rows with padding, and a prefix of which every segment sees its own part."""
    draw = np.random.default_rng(seed)
    q = draw.normal(size=(b, t, n, H)).astype(np.float32)
    k, v = draw.normal(size=(2, b, kv, t, H)).astype(np.float32)
    prefix = tuple(draw.normal(size=(2, kv, PREFIX, H)).astype(np.float32))
    segments = np.minimum(np.arange(t)[None, :] // draw.integers(7, 20, (b, 1)), 3)
    segments = np.where(segments == 3, 0, segments + 1).astype(np.int32)
    part = draw.integers(0, PREFIX + 1, (b, 4))
    shared = np.take_along_axis(part, segments, axis=1).astype(np.int32)
    return q, k, v, segments, prefix, shared


def plain(q, k, v, segments, prefix, shared):
    """All scores at once, in the dtype of the inputs."""
    b, t, n, h = q.shape
    place = jnp.arange(t)
    own = (segments[:, :, None] == segments[:, None, :]) & (place[None, :] <= place[:, None])
    own = own & (segments[:, :, None] != 0) | jnp.eye(t, dtype=bool)  # padding sees itself
    before = jnp.arange(prefix[0].shape[1]) < shared[:, :, None]
    seen = jnp.concatenate([before, own], axis=2)[:, None, None]
    keys, values = (
        jnp.concatenate([jnp.broadcast_to(p, (b, *p.shape)), x], axis=2)
        for p, x in zip(prefix, (k, v), strict=True)
    )
    grouped = q.reshape(b, t, k.shape[1], -1, h)
    score = jnp.einsum("btkgh,bksh->bkgts", grouped, keys) / np.sqrt(h)
    weights = jax.nn.softmax(jnp.where(seen, score, -jnp.inf))
    return jnp.einsum("bkgts,bksh->btkgh", weights, values).reshape(b, t, n, h)


@pytest.fixture(params=["one by one", "together"])
def rows(request, monkeypatch):
    """How rows are worked on: as on a CPU and as on an accelerator."""
    kind = {"one by one": "cpu", "together": "default"}[request.param]
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, **how: how[kind](*x))
    monkeypatch.setattr(module, "_SCORES", 3 * N * 16 * 16)  # a few rows at a time, not all
    return request.param


@pytest.fixture(params=[(512, (512,)), (16, (16, 12)), (7, (5,))])
def tiles(request, monkeypatch):
    """One tile for all; tiles that divide the lengths in part; tiles that do not."""
    block, keys = request.param
    monkeypatch.setattr(module, "_KEYS", keys)
    return block


def test_values_equal_plain_attention(rows, tiles):
    given = inputs()
    expected = plain(*given)
    np.testing.assert_allclose(attention(*given, block=tiles), expected, atol=2e-6, rtol=0)


def test_without_prefix(tiles):
    q, k, v, segments, prefix, shared = inputs()
    expected = plain(q, k, v, segments, prefix, 0 * shared)
    ours = attention(q, k, v, segments, block=tiles)
    np.testing.assert_allclose(ours, expected, atol=2e-6, rtol=0)


def test_equals_the_jax_library():
    q, k, v, *_ = inputs()
    moved = (k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    expected = jax.nn.dot_product_attention(q, *moved, is_causal=True)
    ours = attention(q, k, v, np.ones((B, T), np.int32))
    np.testing.assert_allclose(ours, expected, atol=2e-6, rtol=0)


def test_gradients_equal_those_of_plain_attention(rows, tiles):
    q, k, v, *rest = inputs()
    weight = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)

    def loss(function):
        return lambda q, k, v: jnp.sum(function(q, k, v, *rest) * weight)

    ours = jax.jit(jax.grad(loss(lambda *a: attention(*a, block=tiles)), (0, 1, 2)))(q, k, v)
    expected = jax.grad(loss(plain), (0, 1, 2))(q, k, v)
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5e-6, rtol=0)


def test_the_prefix_carries_no_gradient():
    q, k, v, segments, prefix, shared = inputs()
    found = jax.grad(lambda p: jnp.sum(attention(q, k, v, segments, p, shared) ** 2))(prefix)
    assert all(not leaf.any() for leaf in found)


def test_rows_in_bfloat16_stay_close():
    given = inputs()
    q, k, v, segments, prefix, shared = given
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    ours = attention(*low, segments, tuple(jnp.asarray(p, jnp.bfloat16) for p in prefix), shared)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), plain(*given), atol=0.04, rtol=0)


@pytest.mark.parametrize("shape", meshes((2, 2), (4, 1), (1, 2)))
def test_mesh_equals_one_device(shape):
    q, k, v, segments, prefix, shared = inputs()

    def loss(q, k, v, segments, prefix, shared):
        return jnp.sum(attention(q, k, v, segments, prefix, shared, block=16) ** 2)

    expected = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v, segments, prefix, shared)
    mesh = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])

    def put(x, *names):
        return jax.device_put(x, jax.NamedSharding(mesh, spec(*names)))

    with jax.set_mesh(mesh):
        heads = [put(x, "batch", "kv_heads", None, None) for x in (k, v)]
        sides = tuple(put(p, "kv_heads", None, None) for p in prefix)
        numbers = [put(x, "batch", None) for x in (segments, shared)]
        ours = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(
            put(q, "batch", None, "heads", None), *heads, numbers[0], sides, numbers[1]
        )
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
    for mine, theirs in zip(ours[1], expected[1], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=0)


def test_no_score_matrix_exists():
    """Memory of values and gradients: far below the scores of all queries and keys."""
    q, k, v = (np.zeros(shape, np.float32) for shape in ((1, 4096, 2, 8), *[(1, 1, 4096, 8)] * 2))
    segments = np.ones((1, 4096), np.int32)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, segments, block=256))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096 * 2 * 4 / 8


# --- which tiles are worked on --------------------------------------------------------------------


def packed(length, segments, seed=0, padding=0, left=False):
    """One row [1, length] of segments of random sizes, and padding at an end."""
    draw = np.random.default_rng(seed)
    cuts = np.sort(draw.choice(np.arange(1, length - padding), segments - 1, replace=False))
    ids = np.concatenate([[0], cuts, [length - padding]])
    row = np.repeat(np.arange(1, segments + 1), np.diff(ids))
    return np.pad(row, (padding, 0) if left else (0, padding))[None].astype(np.int32)


def needed(row, queries, keys):
    """Tiles that hold a (query, key) pair which counts, padding's own among them."""
    place, found = np.arange(len(row)), set()
    for q in place:
        sees = (row[: q + 1] == row[q]) & (row[q] != 0)
        sees[q] = True
        found |= {(q // queries, k) for k in np.flatnonzero(sees) // keys}
    return found


def worked_on(segments, queries, keys):
    """Tiles that the bounds of each row say, [(query tile, key tile)] by row."""
    shared = np.zeros_like(segments)
    first = np.asarray(module.reach(segments, shared, queries, keys, 1).first)
    length = segments.shape[1]
    return [
        {
            (i, j)
            for i, start in enumerate(row)
            for j in range(start, min(-(-(i + 1) * queries // keys), -(-length // keys)))
        }
        for row in first
    ]


@pytest.mark.parametrize("padding, left", [(0, False), (1500, False), (1500, True)])
@pytest.mark.parametrize("queries, keys", [(256, 512), (256, 256), (100, 384)])
def test_only_needed_tiles_of_packed_rows_are_worked_on(queries, keys, padding, left):
    row = packed(8192, 60, padding=padding, left=left)
    tiles = worked_on(row, queries, keys)[0]
    assert tiles == needed(row[0], queries, keys)
    whole = worked_on(np.ones_like(row), queries, keys)[0]
    assert len(tiles) < len(whole) / 4


def test_no_needed_tile_is_left_out_whatever_the_ids():
    draw = np.random.default_rng(3)
    rows = np.stack(
        [
            draw.integers(0, 4, 200),
            draw.integers(-3, 3, 200),
            np.sort(draw.integers(-5, 5, 200))[::-1],
            np.repeat(draw.permutation(20), 10),
            np.zeros(200, int),
        ]
    ).astype(np.int32)
    for queries, keys in ((16, 12), (7, 30), (200, 200)):
        for row, tiles in zip(rows, worked_on(rows, queries, keys), strict=True):
            assert needed(row, queries, keys) <= tiles


@pytest.mark.parametrize("many", [1, 2])
def test_tiles_of_other_segments_are_not_read(rows, monkeypatch, many):
    """NaN there would come out as NaN, forward and backward; so would a prefix that none sees."""
    length, queries, keys = 96, 8, 16
    monkeypatch.setattr(module, "_KEYS", (keys,))
    monkeypatch.setattr(module, "_SCORES", many * 2 * queries * keys)
    segments = np.repeat([[1, 2, 3, 4, 5, 0], [7, 8, 9, 9, 9, 9]], 16, axis=1).astype(np.int32)
    shared = np.where(np.isin(segments, (2, 9)), PREFIX, 0).astype(np.int32)
    draw = np.random.default_rng(0)
    q = draw.normal(size=(2, length, 2, H)).astype(np.float32)
    sides = draw.normal(size=(2, 2, 1, length, H)).astype(np.float32)
    prefix = draw.normal(size=(2, 1, PREFIX, H)).astype(np.float32)

    @jax.jit
    def run(q, sides, prefix):
        def loss(q):
            out = attention(q, *sides, segments, tuple(prefix), shared, block=queries)
            return jnp.sum(out * out), out

        (_, out), d_q = jax.value_and_grad(loss, has_aux=True)(q)
        return out, d_q

    clean = run(q, sides, prefix)
    sides[:, :, :, 32:48] = np.nan  # segment 3 of the first row, a part of 9 in the second
    spoilt = run(q, sides, np.full_like(prefix, np.nan))
    reads = np.array(
        [
            [2 in {j for i, j in row if i == t} for t in range(12)]
            for row in worked_on(segments, 8, 16)
        ]
    )
    reads |= shared.reshape(2, 12, queries).any(-1)
    assert 0 < reads.sum() < 24
    if rows == "together" and many == 2:
        reads |= reads.any(0)  # rows that are worked on at once share their tiles
    reads = np.repeat(reads, queries, axis=1)
    for before, after in zip(clean, spoilt, strict=True):
        np.testing.assert_array_equal(np.isnan(after).any((2, 3)), reads)
        np.testing.assert_array_equal(after[~reads], before[~reads])
