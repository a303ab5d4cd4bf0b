"""Qwen3 and its relatives in Flax NNX, run as a pure function over a plain dict.

The NNX modules say what the parameters are and what one block computes. Layers are stacked: every
leaf under `layers` has a leading layer axis and the forward pass is one `lax.scan`. The module is
split once; from then on parameters are a nested dict that jit, optax, Orbax and safetensors all
take as it is, and the block is rebuilt from its slice while tracing, which costs nothing per call.

Shapes: B rows, T tokens, D width, N query heads, K key/value heads, H head size, F MLP width,
V vocabulary, L layers, S cache length, P prefix length.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from oel_jax.models import weighted
from oel_jax.models.attention import attention
from oel_jax.models.cache_storage import from_stored
from oel_jax.models.config import ModelConfig
from oel_jax.models.rope import cos_sin, rotate
from oel_jax.parallel.mesh import constrain, out_spec, shardings
from oel_jax.parallel.vocabulary import lookup

Params = dict[str, Any]

# What a layer keeps for the backward pass: everything, the results of its matrix products (norms,
# rotations, attention weights and the gate are computed again), or its input alone.
REMAT = ("none", "products", "layer")
_PRODUCTS = ("q", "k", "v", "attended", "lse", "o", "gate", "up")

_BLOCK_AXES: dict[str, tuple[str | None, ...]] = {
    "attn_norm": (None,),
    "q": ("embed", "heads", None),
    "k": ("embed", "kv_heads", None),
    "v": ("embed", "kv_heads", None),
    "o": ("heads", None, "embed"),
    "q_bias": ("heads", None),
    "k_bias": ("kv_heads", None),
    "v_bias": ("kv_heads", None),
    "q_norm": (None,),
    "k_norm": (None,),
    "mlp_norm": (None,),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}

# Weights that a low-rank adapter may change: the letters of their input and output axes. An adapter
# is in `layers/lora` as {name: {"a": [L, *input, R], "b": [L, R, *output]}} and means
# W + a b, which is never formed: x W + (x a) b costs R columns and keeps no second W.
ADAPTABLE: dict[str, tuple[str, str]] = {
    "q": ("d", "nh"),
    "k": ("d", "nh"),
    "v": ("d", "nh"),
    "o": ("nh", "d"),
    "gate": ("d", "f"),
    "up": ("d", "f"),
    "down": ("f", "d"),
}


class KeyValues(NamedTuple):
    """Keys and values of all layers: [L, B, K, S, H], or [L, K, S, H] for a shared prefix."""

    keys: Float[Array, "L *B K S H"]
    values: Float[Array, "L *B K S H"]


class CachedPrefix(NamedTuple):
    """A prefix shared by all rows; token t of row b sees its first `length[b, t]` positions."""

    cache: KeyValues
    length: Int[Array, "B T"]


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """Root-mean-square norm, computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return weighted.scale(wide.astype(x.dtype), scale)


def adapter_axes(name: str) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of the two factors of an adapted weight, without the leading layer axis."""
    axes, inputs = _BLOCK_AXES[name], len(ADAPTABLE[name][0])
    return {"a": (*axes[:inputs], None), "b": (None, *axes[inputs:])}


def low_rank(name: str, out: Array, x: Array, lora: Params) -> Array:
    """`out` of weight `name` at input `x`, plus what a layer's adapter adds to it, if anything."""
    if name not in lora:
        return out
    into, out_of = ADAPTABLE[name]
    axes = adapter_axes(name)
    inner = weighted.project(x, lora[name]["a"], f"{into},r", axes["a"])
    return out + weighted.project(inner, lora[name]["b"], f"r,{out_of}", axes["b"])


class Block(nnx.Module):
    """One decoder layer: pre-norm attention and a gated MLP."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d, f, h = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
        n, kv = cfg.num_heads, cfg.num_kv_heads

        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

        self.attn_norm = nnx.Param(jnp.ones(d))
        self.q, self.k, self.v = normal(d, n, h), normal(d, kv, h), normal(d, kv, h)
        self.o = normal(n, h, d)
        if cfg.attention_bias:
            self.q_bias = nnx.Param(jnp.zeros((n, h)))
            self.k_bias = nnx.Param(jnp.zeros((kv, h)))
            self.v_bias = nnx.Param(jnp.zeros((kv, h)))
        if cfg.qk_norm:
            self.q_norm, self.k_norm = nnx.Param(jnp.ones(h)), nnx.Param(jnp.ones(h))
        self.mlp_norm = nnx.Param(jnp.ones(d))
        self.gate, self.up, self.down = normal(d, f), normal(d, f), normal(f, d)

    def __call__(
        self,
        cfg: ModelConfig,
        x: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        attend: Callable[[Array, Array, Array], tuple[Array, Any]],
        lora: Params | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Apply the layer.

        `attend(q [B,T,N,H], k [B,K,T,H], v [B,K,T,H])` returns the attention output and whatever
        the caller wants to keep (updated cache, new keys and values). `lora`: the layer's part of
        an adapter, see `ADAPTABLE`.
        """
        lora = lora or {}
        with jax.named_scope("attention"):
            y = rms_norm(x, self.attn_norm[...], cfg.rms_norm_eps)
            q = checkpoint_name(self._project(y, "q", lora), "q")
            k = checkpoint_name(self._project(y, "k", lora), "k")
            v = checkpoint_name(self._project(y, "v", lora), "v")
            if cfg.qk_norm:
                q = rms_norm(q, self.q_norm[...], cfg.rms_norm_eps)
                k = rms_norm(k, self.k_norm[...], cfg.rms_norm_eps)
            q, k = rotate(q, *rope), rotate(k, *rope)
            out, kept = attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
            x = x + checkpoint_name(self._project(out, "o", lora), "o")
        with jax.named_scope("mlp"):
            y = rms_norm(x, self.mlp_norm[...], cfg.rms_norm_eps)
            gate = checkpoint_name(self._project(y, "gate", lora), "gate")
            up = checkpoint_name(self._project(y, "up", lora), "up")
            return x + self._project(jax.nn.silu(gate) * up, "down", lora), kept

    def _project(self, x: Array, name: str, lora: Params) -> Float[Array, "B T ..."]:
        """`x` times the weight `name`, plus what its adapter adds, plus its bias."""
        weight = getattr(self, name)[...]
        out = weighted.project(x, weight, ",".join(ADAPTABLE[name]), _BLOCK_AXES[name])
        out = low_rank(name, out, x, lora)
        bias = getattr(self, f"{name}_bias", None)
        return out if bias is None else weighted.shift(out, bias[...])


class Decoder(nnx.Module):
    """The whole network; `layers` holds all blocks, stacked along a leading layer axis."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        vocab = (cfg.vocab_size, cfg.hidden_size)
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), vocab))

        @nnx.split_rngs(splits=cfg.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(layer_rngs: nnx.Rngs) -> Block:
            return Block(cfg, rngs=layer_rngs)

        self.layers = stacked(rngs)
        self.final_norm = nnx.Param(jnp.ones(cfg.hidden_size))
        if not cfg.tie_embeddings:
            self.lm_head = nnx.Param(0.02 * jax.random.normal(rngs.params(), vocab))


@lru_cache(maxsize=16)
def _block_graph(cfg: ModelConfig) -> nnx.GraphDef:
    """Static structure of one block, from which a slice of parameters is made a `Block` again."""
    return nnx.split(nnx.eval_shape(lambda: Block(cfg, rngs=nnx.Rngs(0))))[0]


def init_params(cfg: ModelConfig, key: Array, dtype: jnp.dtype = jnp.float32) -> Params:
    """Fresh parameters as a nested dict; call under jit with `out_shardings` to place them."""
    tree = nnx.to_pure_dict(nnx.state(Decoder(cfg, rngs=nnx.Rngs(params=key)), nnx.Param))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def abstract_params(cfg: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Params:
    """Shapes and dtypes of the parameters; nothing is allocated."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _shapes(cfg))


@lru_cache(maxsize=16)
def _shapes(cfg: ModelConfig) -> Params:
    """Traced once for a model: the planner asks for it with every mesh that it tries."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def param_axes(cfg: ModelConfig) -> Params:
    """Logical axis names of every parameter, in the shape of the parameter tree."""
    axes: Params = {"embed": ("vocab", "embed"), "final_norm": (None,)}
    if not cfg.tie_embeddings:
        axes["lm_head"] = ("vocab", "embed")
    names = abstract_params(cfg)["layers"]
    axes["layers"] = {name: (None, *_BLOCK_AXES[name]) for name in names}
    return axes


def param_shardings(cfg: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """NamedSharding of every parameter on `mesh`."""
    return shardings(mesh, param_axes(cfg))


def output_matrix(cfg: ModelConfig, params: Params) -> Float[Array, "V D"]:
    """The output matrix: the embedding itself when tied."""
    return params["embed"] if cfg.tie_embeddings else params["lm_head"]


def embed(params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the embedding table, split over the batch."""
    return lookup(params["embed"], tokens)


def layer_slice(params: Params, index: int | Array) -> Params:
    """Parameters of one layer."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), params["layers"]
    )


def run_block(cfg: ModelConfig, weights: Params, x: Array, rope: Any, attend: Callable):
    """Apply one layer given its slice of the parameters, with its adapter if it has one."""
    own = {name: leaf for name, leaf in weights.items() if name != "lora"}
    with jax.named_scope("block"):
        return nnx.merge(_block_graph(cfg), own)(cfg, x, rope, attend, weights.get("lora"))


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    prefix: CachedPrefix | None = None,
    remat: str = "none",
    block: int = 256,
    keep: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], KeyValues]:
    """Hidden states after the final norm, in the dtype of `params`.

    Args:
      tokens: ids.
      positions: rotary position of each token (count a prefix's tokens in).
      segments: 0 is padding; a token sees earlier columns of its own segment only, so rows may be
        right-padded, left-padded or packed.
      prefix: keys and values every row may see before its own (knowledge, encoded once).
      remat: what layers keep for the backward pass, one of `REMAT`.
      block: query block of the attention.
      keep: also return, of all layers, what this makes of a layer's keys [B, K, T, H] and values.
    """
    rope = cos_sin(cfg, positions)

    def body(x: Array, layer: tuple[Params, Any]):
        weights, shared = layer

        def attend(q: Array, k: Array, v: Array):
            known = None if shared is None else tuple(map(from_stored, shared))
            length = None if shared is None else prefix.length
            kept = None if keep is None else KeyValues(keep(k), keep(v))
            return attention(q, k, v, segments, known, length, block=block), kept

        return run_block(cfg, weights, x, rope, attend)

    if remat != "none":
        kept = _PRODUCTS if remat == "products" else ()
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    shared = None if prefix is None else prefix.cache
    x, cache = jax.lax.scan(body, embed(params, tokens), (params["layers"], shared))
    x = rms_norm(x, params["final_norm"], cfg.rms_norm_eps)
    return x if keep is None else (x, cache)


def unembed(cfg: ModelConfig, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Float32 logits of all tokens, for pre-training and for notebooks.

    The vocabulary stays split over 'tp', but the matrix is gathered over 'fsdp'. Sampling and the
    loss go other ways (`sampling.draw`, `distill.topk_kl`), on which nothing is.
    """
    lead = [None] * (hidden.ndim - 2)
    return jnp.einsum(
        "...d,vd->...v",
        hidden,
        constrain(output_matrix(cfg, params), "vocab", None),
        preferred_element_type=jnp.float32,
        out_sharding=out_spec("batch", *lead, "vocab"),
    )
