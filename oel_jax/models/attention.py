"""Attention over whole rows, streamed: scores exist for one tile of queries and keys at a time.

A token sees the earlier tokens of its own segment and, before them, the beginning of a knowledge
prefix that all rows share (no batch axis: nothing is copied per row). One softmax runs over both,
carried from key tile to key tile, so attending to a cached prefix equals attending to the
concatenated sequence. The backward pass makes the tiles again from the saved log-sum-exp, as in
FlashAttention (Dao et al. 2022). Key tiles are never touched if they are wholly after a query tile,
or before the first one that has a segment of it: in a packed row that is most of them.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from oel_jax.parallel.mesh import spec

_MASKED = -1e30  # finite, so that padding that sees nothing stays finite
_KEYS = (512, 384, 320, 256)  # sizes of a key tile: what pads a length least, the largest first
_SCORES = 1 << 27  # scores of all rows that are worked on at a time, on an accelerator


class _Tiles(NamedTuple):
    """Static sizes: queries, own keys and prefix keys of a tile."""

    queries: int
    keys: int
    prefix: int


class TileReach(NamedTuple):
    """Which key tiles a query tile works on: own ones from `first` on, prefix ones up to `shared`.

    Its own last one is the one with its last query.
    """

    first: Int[Array, "*B blocks"]
    shared: Int[Array, "*B blocks"]


class _Rows(NamedTuple):
    """What belongs to one row, or with a leading axis to several."""

    q: Float[Array, "blocks K G Q H"]
    k: Float[Array, "K S H"]
    v: Float[Array, "K S H"]
    query_segments: Int[Array, "blocks Q"]
    key_segments: Int[Array, " S"]
    shared: Int[Array, "blocks Q"]
    reach: TileReach


class _Prefix(NamedTuple):
    """What all rows share."""

    keys: Float[Array, "K P H"]
    values: Float[Array, "K P H"]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
    prefix: tuple[Float[Array, "K P H"], Float[Array, "K P H"]] | None = None,
    shared: Int[Array, "B T"] | None = None,
    *,
    block: int = 256,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, softmax in float32, scores scaled by H ** -0.5.

    Query head n reads key/value head n // (N / K). Token t of row b sees the columns up to t whose
    segment id is its own, and the first shared[b, t] positions of the prefix. A token of segment 0,
    padding, sees itself in place of others. The prefix carries no gradient. `block`: queries of a
    tile.

    Any ids in any order are right; work is saved where the tokens of a segment are side by side and
    ids rise along the row, as in packed rows.
    """
    if prefix is None:
        none = jnp.zeros((k.shape[1], 0, k.shape[3]), k.dtype)
        prefix, shared = (none, none), jnp.zeros_like(segments)
    prefix = jax.lax.stop_gradient(prefix)
    return _attend(block, q, k, v, segments, *prefix, shared)


def key_tile(length: int) -> int:
    """Keys of a tile for so many keys."""
    if length <= _KEYS[0]:
        return max(length, 1)
    return min(_KEYS, key=lambda size: (length + -length % size, -size))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block: int, *inputs: Array) -> Array:
    return _on_devices(partial(_forward, block), inputs, "qs")[0]


def _attend_forward(block: int, *inputs: Array):
    out, lse = _on_devices(partial(_forward, block), inputs, "qs")
    # Named, so that a layer that keeps them does not run its attention again.
    out, lse = checkpoint_name(out, "attended"), checkpoint_name(lse, "lse")
    return out, (*inputs, out, lse)


def _attend_backward(block: int, saved: tuple[Array, ...], d_out: Array):
    gradients = _on_devices(partial(_backward, block), (*saved, d_out), "qkk")
    return (*gradients, None, None, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _on_devices(function, arrays: tuple[Array, ...], returns: str):
    """Call on the local rows and heads of each device of the mesh in context.

    Neither needs another's; `returns` names the layout of each result.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*arrays)
    layouts = {
        "q": spec("batch", None, "heads", None),  # [B, T, N, H]
        "k": spec("batch", "kv_heads", None, None),  # [B, K, T, H]
        "s": spec("batch", None, "heads"),  # [B, T, N]
        "r": spec("batch", None),  # [B, T]
        "p": spec("kv_heads", None, None),  # [K, P, H]
    }
    inputs = "qkkrppr" + "qsq"  # as `attention` takes them; output, log-sum-exp and its gradient
    specs = tuple(layouts[letter] for letter in inputs[: len(arrays)])
    arrays = tuple(jax.reshard(x, at) for x, at in zip(arrays, specs, strict=True))
    out = tuple(layouts[letter] for letter in returns)
    return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)(*arrays)


# --- one device -----------------------------------------------------------------------------------


def reach(
    segments: Int[Array, "B T"], shared: Int[Array, "B T"], queries: int, keys: int, prefix: int
) -> TileReach:
    """What each query tile works on, for these sizes of tiles, [B, blocks].

    A key tile is left out if it cannot have a segment of the query tile: the ranges of their ids,
    padding not counted, do not meet.
    """
    length = segments.shape[1]
    count, last = -(-length // queries), -(-length // keys)

    def bounds(size: int) -> tuple[Array, Array]:
        ends = jnp.iinfo(jnp.int32)
        more = ((0, 0), (0, -length % size))

        def tiled(padding: int) -> Array:
            ids = jnp.where(segments == 0, padding, segments)
            ids = jnp.pad(ids, more, constant_values=padding)
            return ids.reshape(ids.shape[0], -1, size)

        return tiled(ends.max).min(-1), tiled(ends.min).max(-1)

    low, high = (side[:, :, None] for side in bounds(queries))
    key_low, key_high = (side[:, None, :] for side in bounds(keys))
    own = jnp.arange(count) * queries // keys  # with the first query: itself, if nothing before
    tile = jnp.arange(last)
    meets = (key_low <= high) & (low <= key_high) & (tile < own[:, None])
    first = jnp.where(meets, tile, own[:, None]).min(-1)
    shared = jnp.pad(shared, ((0, 0), (0, -length % queries)))
    return TileReach(first, -(-shared.reshape(-1, count, queries).max(-1) // prefix))


def _cut(block: int, q, k, v, segments, keys, values, shared) -> tuple[_Tiles, _Rows, _Prefix]:
    """Everything in tiles: queries padded to whole ones, keys as well."""
    b, t, n, h = q.shape
    kv = k.shape[1]
    tiles = _Tiles(min(block, t), key_tile(t), key_tile(keys.shape[1]))
    more, extra = -t % tiles.queries, -t % tiles.keys
    q = _queries(tiles, q, kv)

    def blocks(x: Array, filler: int) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, more)), constant_values=filler)
        return padded.reshape(b, -1, tiles.queries)

    rows = _Rows(
        q,
        *(jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) for x in (k, v)),
        blocks(segments, 0),
        jnp.pad(segments, ((0, 0), (0, extra))),
        blocks(shared, 0),
        reach(segments, shared, *tiles),
    )
    behind = -keys.shape[1] % tiles.prefix
    prefix = _Prefix(*(jnp.pad(x, ((0, 0), (0, behind), (0, 0))) for x in (keys, values)))
    return tiles, rows, prefix


def _queries(tiles: _Tiles, x: Float[Array, "B T N *H"], kv: int) -> Array:
    """[B, T, N, ...] -> [B, blocks, K, G, Q, ...], padded."""
    b, t, n, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -t % tiles.queries), *[(0, 0)] * (x.ndim - 2)))
    x = x.reshape(b, -1, tiles.queries, kv, n // kv, *rest)
    return jnp.moveaxis(x, 2, 4)


def _back(x: Array, length: int) -> Array:
    """What `_queries` did, undone."""
    x = jnp.moveaxis(x, 4, 2)
    return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4], *x.shape[5:])[:, :length]


def _over_rows(function, tiles: _Tiles, rows: _Rows, *rest: Array):
    """Map over rows: one by one on a CPU, whose caches hold a tile; many at once elsewhere.

    Those that are worked on at once work on the tiles that any of them needs.
    """
    heads = rows.q.shape[2] * rows.q.shape[3]
    many = max(1, _SCORES // (heads * tiles.queries * max(tiles.keys, tiles.prefix)))
    count = rows.q.shape[0]

    def one_by_one(*all_rows):
        return jax.lax.map(lambda row: function(*row), all_rows)

    def at_once(all_rows):
        rows, *rest = all_rows
        joint = TileReach(rows.reach.first.min(0), rows.reach.shared.max(0))
        axes = _Rows(*[0] * 6, TileReach(None, None)), *[0] * len(rest)
        return jax.vmap(function, in_axes=axes)(rows._replace(reach=joint), *rest)

    def together(*all_rows):
        if count <= many:
            return at_once(all_rows)
        whole = count // many * many
        groups = jax.tree.map(lambda x: x[:whole].reshape(-1, many, *x.shape[1:]), all_rows)
        done = jax.lax.map(at_once, groups)
        done = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), done)
        if whole == count:
            return done
        left = at_once(jax.tree.map(lambda x: x[whole:], all_rows))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), done, left)

    if count == 1:
        return one_by_one(rows, *rest)
    return jax.lax.platform_dependent(rows, *rest, cpu=one_by_one, default=together)


def _piece(x: Array, index: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _scores(q: Float[Array, "K G Q H"], keys: Float[Array, "K s H"], seen: Array) -> Array:
    """Scaled scores [K, G, Q, s] in float32."""
    score = jnp.einsum("kgqh,ksh->kgqs", q, keys, preferred_element_type=jnp.float32)
    return jnp.where(seen, score * q.shape[-1] ** -0.5, _MASKED)


class _Sees(NamedTuple):
    """Of one query tile: what it may see, and where its own key tiles end."""

    tiles: _Tiles
    index: Array
    segments: Int[Array, " Q"]
    key_segments: Int[Array, " S"]
    shared: Int[Array, " Q"]

    def prefix(self, tile: Array) -> Array:
        place = tile * self.tiles.prefix + jnp.arange(self.tiles.prefix)
        return place[None, :] < self.shared[:, None]

    def own(self, tile: Array) -> Array:
        query = self.index * self.tiles.queries + jnp.arange(self.tiles.queries)
        place = tile * self.tiles.keys + jnp.arange(self.tiles.keys)
        theirs = _piece(self.key_segments, tile, self.tiles.keys, 0)
        before = place[None, :] <= query[:, None]
        mine = self.segments[:, None]
        # Padding sees itself, so that its softmax is over something.
        return before & (mine == theirs[None, :]) & (mine != 0) | (place == query[:, None])

    @property
    def own_end(self) -> Array:
        reach = -(-((self.index + 1) * self.tiles.queries) // self.tiles.keys)
        return jnp.minimum(reach, self.key_segments.shape[0] // self.tiles.keys)


def _forward(block: int, *inputs: Array) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Output and log-sum-exp of the scores."""
    tiles, rows, prefix = _cut(block, *inputs)

    def row(whole: _Rows):
        def tile(numbered):
            index, q, segments, shared, reach = numbered
            sees = _Sees(tiles, index, segments, whole.key_segments, shared)

            def fold(carry, keys, values, seen):
                highest, total, out = carry
                score = _scores(q, keys, seen)
                top = jnp.maximum(highest, score.max(-1))
                keep, weights = jnp.exp(highest - top), jnp.exp(score - top[..., None])
                part = jnp.einsum(
                    "kgqs,ksh->kgqh",
                    weights.astype(values.dtype),
                    values,
                    preferred_element_type=jnp.float32,
                )
                return top, total * keep + weights.sum(-1), out * keep[..., None] + part

            def see_prefix(i, carry):
                pair = (_piece(x, i, tiles.prefix, 1) for x in prefix)
                return fold(carry, *pair, sees.prefix(i))

            def see_own(i, carry):
                pair = (_piece(x, i, tiles.keys, 1) for x in (whole.k, whole.v))
                return fold(carry, *pair, sees.own(i))

            zero = jnp.zeros(q.shape, jnp.float32)
            carry = (jnp.full(q.shape[:-1], _MASKED, jnp.float32), zero[..., 0], zero)
            if prefix.keys.shape[1]:
                carry = jax.lax.fori_loop(0, reach.shared, see_prefix, carry)
            top, total, out = jax.lax.fori_loop(reach.first, sees.own_end, see_own, carry)
            return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

        numbers = jnp.arange(whole.q.shape[0])
        each = (numbers, whole.q, whole.query_segments, whole.shared, whole.reach)
        return jax.lax.map(tile, each)

    length = inputs[0].shape[1]
    return tuple(_back(x, length) for x in _over_rows(row, tiles, rows))


def _backward(block: int, *saved: Array) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v."""
    *inputs, out, lse, d_out = saved
    tiles, rows, prefix = _cut(block, *inputs)
    kv = inputs[1].shape[1]
    wide = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    rest = tuple(_queries(tiles, x, kv) for x in (lse, wide, d_out))

    def row(whole: _Rows, lse: Array, wide: Array, d_out: Array):
        def tile(carry, numbered):
            index, q, segments, shared, reach, lse, wide, d_out = numbered
            sees = _Sees(tiles, index, segments, whole.key_segments, shared)

            def score_gradient(keys, values, seen):
                weights = jnp.exp(_scores(q, keys, seen) - lse[..., None])
                up = jnp.einsum("kgqh,ksh->kgqs", d_out, values, preferred_element_type=jnp.float32)
                change = weights * (up - wide[..., None]) * q.shape[-1] ** -0.5
                change = change.astype(q.dtype)
                part = jnp.einsum(
                    "kgqs,ksh->kgqh", change, keys, preferred_element_type=jnp.float32
                )
                return weights, change, part

            def see_prefix(i, d_q):
                pair = (_piece(x, i, tiles.prefix, 1) for x in prefix)
                return d_q + score_gradient(*pair, sees.prefix(i))[2]

            def see_own(i, carry):
                d_q, d_k, d_v = carry
                pair = (_piece(x, i, tiles.keys, 1) for x in (whole.k, whole.v))
                weights, change, part = score_gradient(*pair, sees.own(i))

                def add(total: Array, weight: Array, side: Array) -> Array:
                    new = jnp.einsum(
                        "kgqs,kgqh->ksh", weight, side, preferred_element_type=jnp.float32
                    )
                    new += _piece(total, i, tiles.keys, 1)
                    return jax.lax.dynamic_update_slice_in_dim(total, new, i * tiles.keys, 1)

                weights = weights.astype(d_out.dtype)
                return d_q + part, add(d_k, change, q), add(d_v, weights, d_out)

            d_q = jnp.zeros(q.shape, jnp.float32)
            if prefix.keys.shape[1]:
                d_q = jax.lax.fori_loop(0, reach.shared, see_prefix, d_q)
            d_q, *carry = jax.lax.fori_loop(reach.first, sees.own_end, see_own, (d_q, *carry))
            return tuple(carry), d_q.astype(q.dtype)

        zero = jnp.zeros(whole.k.shape, jnp.float32)
        numbers = jnp.arange(whole.q.shape[0])
        inputs = (numbers, whole.q, whole.query_segments, whole.shared, whole.reach)
        inputs += (lse, wide, d_out)
        (d_k, d_v), d_q = jax.lax.scan(tile, (zero, zero), inputs)
        return d_q, d_k.astype(whole.k.dtype), d_v.astype(whole.v.dtype)

    length = inputs[0].shape[1]
    d_q, d_k, d_v = _over_rows(row, tiles, rows, *rest)
    return _back(d_q, length), d_k[:, :, :length], d_v[:, :, :length]
