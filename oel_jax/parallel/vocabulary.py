"""The vocabulary dimension: its matrices on many devices, and choices among its columns.

An embedding or output matrix rests as [V / tp, D / fsdp] on a device. Nobody ever gathers it:

    output    `spread` turns it into [V / N, D], rows over all N = tp * fsdp devices, by an
              all-to-all of 1 / N of its bytes. A few hidden states are gathered over 'fsdp', each
              device makes the logits of its columns, and `whole_rows` exchanges these so that a
              device has all columns of a few rows. What follows (softmax, top-k, a draw, a loss)
              is then the code of one device. `slices_of_rows` is the way back, for gradients.
    input     `lookup` reads the device's D / fsdp columns for the tokens of all devices and
              exchanges them for all columns of its own tokens.

N need not divide V: the rows of each tp slice are padded to a multiple of fsdp, and the columns
this makes are cut off where rows become whole, so that nothing after can see them.

`spread`, `whole_rows` and what is between them run inside `shard_map` on local arrays. Along a mesh
axis of one device, and without a mesh, nothing moves.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int

from oel_jax.parallel.mesh import all_rows, axis_size, spec
from oel_jax.parallel.sums import rounded

AT_REST = spec("vocab", "embed")  # an embedding or output matrix
SPREAD = P(("tp", "fsdp"), None)  # the same with rows over all devices


def _exchange(x: Array, axis: str, split: int, concat: int) -> Array:
    """All-to-all: dimension `split` is divided among the devices, `concat` becomes whole."""
    if axis_size(axis) == 1:
        return x
    return jax.lax.all_to_all(x, axis, split, concat, tiled=True)


def _pad(x: Array, dimension: int, multiple: int) -> Array:
    """Zeros at the end of one dimension, up to a multiple."""
    more = [(0, 0)] * x.ndim
    more[dimension] = (0, -x.shape[dimension] % multiple)
    return jnp.pad(x, more)


# --- the output matrix ----------------------------------------------------------------------------


def spread(matrix: Float[Array, "V_tp D_fsdp"]) -> Float[Array, "V_N D"]:
    """A matrix at rest -> its rows over all devices; rows of zeros fill up each tp slice."""
    return _exchange(_pad(matrix, 0, axis_size("fsdp")), "fsdp", 0, 1)


def unspread(matrix: Float[Array, "V_N D"], rows: int) -> Float[Array, "V_tp D_fsdp"]:
    """What `spread` did to a matrix of `rows` local rows, undone."""
    return _exchange(matrix, "fsdp", 1, 0)[:rows]


def spread_over_all(matrix: Float[Array, "V D"]) -> Float[Array, "W D"]:
    """`spread`, called outside of `shard_map`; W is V and its padding."""
    if jax.sharding.get_abstract_mesh().empty:
        return matrix
    return jax.shard_map(spread, in_specs=AT_REST, out_specs=SPREAD, check_vma=False)(matrix)


def summed_rows(x: Float[Array, "fsdp_r D"]) -> Float[Array, "r D"]:
    """Sum of what all devices have for one's own rows: the gradient of `all_rows`."""
    if axis_size("fsdp") > 1:
        x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
    return x if axis_size("tp") == 1 else jax.lax.psum(x, "tp")


def logits(
    rows: Float[Array, "fsdp_r D"], matrix: Float[Array, "V_N D"]
) -> Float[Array, "fsdp_r V_N"]:
    """Float32 logits of gathered rows for the columns of this device."""
    return jnp.einsum("nd,vd->nv", rows, matrix, preferred_element_type=jnp.float32)


def whole_rows(z: Float[Array, "fsdp_r V_N"], size: int) -> Float[Array, "r_tp V"]:
    """All columns of one's own rows; `size` = V. r must be a multiple of tp."""
    z = _exchange(z, "fsdp", 0, 1)[:, : size // axis_size("tp")]
    return _exchange(z, "tp", 0, 1)


def slices_of_rows(z: Float[Array, "r_tp V"]) -> Float[Array, "fsdp_r V_N"]:
    """The way back of `whole_rows`; zeros in the padding."""
    z = _exchange(z, "tp", 1, 0)
    return _exchange(_pad(z, 1, axis_size("fsdp")), "fsdp", 1, 0)


def my_rows(x: Array) -> Array:
    """[r, ...] -> [r / tp, ...]: the rows that `whole_rows` makes whole on this device."""
    count = axis_size("tp")
    if count == 1:
        return x
    size = x.shape[0] // count
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("tp") * size, size, axis=0)


def joined_rows(x: Array) -> Array:
    """[r / tp, ...] -> [r, ...]: what `my_rows` did, undone."""
    return x if axis_size("tp") == 1 else jax.lax.all_gather(x, "tp", axis=0, tiled=True)


# --- the embedding --------------------------------------------------------------------------------


@jax.custom_vjp
def lookup(table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of an embedding table at rest, split over the batch as `ids` are.

    An id beyond the vocabulary reads its last row. The gradient of a row is summed over all tokens
    in float32 and rounded to the table's dtype once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jnp.asarray(table).at[ids].get(mode="clip")
    if mesh.size == 1:
        return table.at[ids].get(out_sharding=P("fsdp", None, None), mode="clip")
    run = jax.shard_map(
        _local_lookup,
        in_specs=(AT_REST, P("fsdp", None)),
        out_specs=P("fsdp", None, None),
        check_vma=False,
    )
    return run(table, ids)


def _local_lookup(table: Float[Array, "V_tp D_fsdp"], ids: Int[Array, "b T"]) -> Array:
    columns, here = _columns(table.shape[0], ids)
    x = jnp.where(here[..., None], table.at[columns].get(mode="clip"), 0)
    x = _exchange(x, "fsdp", 0, 2)
    return x if axis_size("tp") == 1 else jax.lax.psum(x, "tp")


def _columns(size: int, ids: Int[Array, "b T"]) -> tuple[Array, Array]:
    """Rows of the local table for the ids of all devices, and which of them it has."""
    ids = jnp.clip(all_rows(ids), 0, size * axis_size("tp") - 1)
    if axis_size("tp") > 1:
        ids = ids - jax.lax.axis_index("tp") * size
    return ids, (ids >= 0) & (ids < size)


def _lookup_forward(table: Array, ids: Array) -> tuple[Array, tuple]:
    return lookup(table, ids), (table, ids)


def _lookup_backward(saved: tuple, d_x: Float[Array, "B T D"]) -> tuple[Array, None]:
    table, ids = saved

    def local(d_x: Array, ids: Array) -> Float[Array, "V_tp D_fsdp"]:
        size = table.shape[0] // axis_size("tp")
        columns, here = _columns(size, ids)
        d_x = _exchange(d_x, "fsdp", 2, 0)
        # Another device's id goes to a row that does not exist, and is dropped there.
        columns = jnp.where(here, columns, size)
        total = jnp.zeros((size, d_x.shape[-1]), jnp.float32)
        total = total.at[columns].add(d_x.astype(jnp.float32), mode="drop")
        return rounded(total, table.dtype)

    if jax.sharding.get_abstract_mesh().empty:
        return local(d_x, ids), None
    rows = P("fsdp", None)
    run = jax.shard_map(
        local, in_specs=(P("fsdp", None, None), rows), out_specs=AT_REST, check_vma=False
    )
    return run(d_x, ids), None


lookup.defvjp(_lookup_forward, _lookup_backward)


# --- whole rows -----------------------------------------------------------------------------------


LEAST = -1e6  # the lowest log-probability, nats: what a logit of minus infinity counts as
_LOWEST = float(jnp.finfo(jnp.float32).min)


class LogSoftmax(NamedTuple):
    """log_softmax(z / temperature) of whole rows, as the parts that it is made of.

    A log-probability is (z - high) / temperature - log_sum, in this order: z - (high + log_sum)
    would keep only the digits that are left after those of `high`. No second array of the size of
    `z` is made where `all` is used inside one fused loop.
    """

    z: Float[Array, "R V"]
    high: Float[Array, "R 1"]  # the largest logit
    log_sum: Float[Array, "R 1"]  # log of the sum of exp((z - high) / temperature)
    temperature: float | Array

    def below_high(self, z: Float[Array, "R n"]) -> Float[Array, "R n"]:
        """(z - high) / temperature, at least LEAST."""
        return jnp.maximum((z - self.high) / self.temperature, LEAST)

    def all(self) -> Float[Array, "R V"]:
        """Log-probabilities of all ids."""
        return self.below_high(self.z) - self.log_sum

    def at(self, ids: Int[Array, "R n"]) -> Float[Array, "R n"]:
        """Log-probabilities of these ids; NaN for one beyond the vocabulary."""
        return self.below_high(take(self.z, ids)) - self.log_sum


def log_softmax(z: Float[Array, "R V"], temperature: float | Array = 1.0) -> LogSoftmax:
    """Log-probabilities of each row, exact to float32's digits also where one is nearly 0.

    The largest entry adds exactly 1 to the sum and is left out of it, so that what the others add
    keeps its digits however little it is. A logit that is more than -LEAST below the largest
    (minus infinity, say) counts as that far below: differences of log-probabilities stay finite.
    In a row of nothing else every log-probability is LEAST.
    """
    high = jnp.maximum(z.max(-1, keepdims=True), _LOWEST)
    parts = LogSoftmax(z, high, jnp.zeros_like(high), temperature)
    largest = z == high
    others = jnp.where(largest, 0.0, jnp.exp(parts.all())).sum(-1, keepdims=True)
    ties = jnp.maximum(largest.sum(-1, keepdims=True) - 1.0, 0.0)
    return parts._replace(log_sum=jnp.log1p(others + ties))


def block_top_k(
    z: Float[Array, "R V"], k: int, block: int
) -> tuple[Float[Array, "R k"], Int[Array, "R k"]]:
    """`jax.lax.top_k`, ties included, by sorting V / block + k * block values in place of V.

    The k largest are in the k blocks with the largest maxima: each of those has an element that no
    element of another block exceeds. Where such a maximum ties, `top_k` takes the earlier block,
    and the candidates keep the order of their ids, so that equal values come lowest id first.
    """
    rows, width = z.shape
    padded = jnp.pad(z, ((0, 0), (0, -width % block)), constant_values=-jnp.inf)
    blocks = padded.reshape(rows, -1, block)
    chosen = jnp.sort(jax.lax.top_k(blocks.max(-1), k)[1], axis=-1)
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(rows, -1)
    values, place = jax.lax.top_k(candidates, k)
    return values, jnp.take_along_axis(chosen, place // block, axis=1) * block + place % block


def top_k(z: Float[Array, "R V"], k: int) -> tuple[Float[Array, "R k"], Int[Array, "R k"]]:
    """The k largest values of each row and their ids; of equal ones the lowest ids."""
    if k == 1:
        # XLA's argmax is one slow reduction of pairs on a CPU; these are two fast ones.
        high = z.max(-1, keepdims=True)
        places = jnp.where(z == high, jnp.arange(z.shape[-1]), z.shape[-1] - 1)
        return high, places.min(-1, keepdims=True)
    ratio = z.shape[-1] // k
    if ratio < 32:  # blocks would not save half of the work
        return jax.lax.top_k(z, k)
    return block_top_k(z, k, 1 << round(math.log2(ratio) / 2))


def take(z: Float[Array, "R V"], ids: Int[Array, "R k"]) -> Float[Array, "R k"]:
    """Values of `z` at ids."""
    return jnp.take_along_axis(z, ids, axis=1)


def argmax(z: Float[Array, "R V"]) -> Int[Array, " R"]:
    """Id of the largest value, of equal ones the lowest."""
    return top_k(z, 1)[1][:, 0]
