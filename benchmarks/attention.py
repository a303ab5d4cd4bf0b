"""Attention of a packed row, forward and backward, against the same row as one segment.

    python -m benchmarks.attention [--tokens=8192] [--segments=60] [--heads=16] [--dtype=float32]

The same arrays and shapes; only the segment ids differ. With one segment every key tile up to a
query is worked on: what a packed row costs too where tiles of other segments are not left out.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import side_by_side
from benchmarks.side_by_side import Bar, finish, race, ratio, spread
from oel_jax.models.attention import attention, key_tile, reach

QUERIES = 256  # of a tile: config.model.attention_block


def packed_row(tokens: int, segments: int) -> np.ndarray:
    """Ids [1, tokens]: segments of random sizes, from half to one and a half of the mean."""
    sizes = np.random.default_rng(0).uniform(0.5, 1.5, segments)
    ends = np.round(np.cumsum(sizes) / sizes.sum() * tokens).astype(int)
    return np.searchsorted(ends, np.arange(tokens), side="right")[None].astype(np.int32) + 1


def tiles_of(segments: np.ndarray) -> int:
    """(query, key) tiles that are worked on."""
    length, keys = segments.shape[1], key_tile(segments.shape[1])
    first = np.asarray(reach(segments, np.zeros_like(segments), QUERIES, keys, 1).first)[0]
    ends = -(-(np.arange(len(first)) + 1) * QUERIES // keys)
    return int((np.minimum(ends, -(-length // keys)) - first).sum())


def main() -> int:
    """Command line; returns the exit status."""
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--segments", type=int, default=60)
    parser.add_argument("--heads", type=int, default=16, help="query heads; half as many of keys")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    tokens, heads, dtype = options.tokens, options.heads, jnp.dtype(options.dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((1, tokens, heads, 64), *[(1, heads // 2, tokens, 64)] * 2)
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    rows = {"packed": packed_row(tokens, options.segments), "one segment": None}
    rows["one segment"] = np.ones_like(rows["packed"])

    @jax.jit
    def gradients(q, k, v, segments):
        def loss(q, k, v):
            return jnp.sum(attention(q, k, v, segments, block=QUERIES).astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    sides = {
        name: lambda ids=ids: jax.block_until_ready(gradients(*arrays, ids))
        for name, ids in rows.items()
    }
    seconds = race(sides, options.repeats)
    found = ratio(seconds["one segment"], seconds["packed"])
    tiles = {name: tiles_of(ids) for name, ids in rows.items()}
    sizes = np.bincount(rows["packed"][0])
    seen = {"packed": int((sizes * (sizes + 1) // 2).sum()), "one segment": tokens**2 // 2}
    print(f"one segment / packed: {spread(found)}")
    table = [
        [name, f"{min(some):.2f}", tiles[name], f"{seen[name] / 1e6:.2f}"]
        for name, some in seconds.items()
    ]
    usual = tokens == 8192 and options.segments == 60
    bars = [Bar("attention: one segment / packed row", found[0], 3.0 if usual else None)]
    settings = {"tokens": tokens, "segments": options.segments, "heads": heads}
    settings |= {"dtype": options.dtype}
    measured = {"seconds": seconds, "ratio": found, "tiles": tiles, "pairs_that_count": seen}
    headers = ["row", "best seconds", "tiles", "million pairs that count"]
    return finish("attention", settings, table, headers, bars, measured, options)


if __name__ == "__main__":
    sys.exit(main())
