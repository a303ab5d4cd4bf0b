"""Which Hugging Face tensor is which leaf of our parameter tree, and how their axes correspond.

Hugging Face stores one matrix [out, in] per projection and layer, with heads flattened; we store
one leaf per projection with a leading layer axis and separate head axes (`oel_jax.models.decoder`).
"""

import dataclasses
import math

import numpy as np

from oel_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """One line of the table: a leaf and the Hugging Face tensor (one per layer) it is made of.

    Axes are letters: V vocabulary, D hidden, N query heads, K key/value heads, H head dimension,
    F feed-forward. `theirs` groups letters that Hugging Face flattens into one axis; `ours` is the
    order in the leaf, where a name with `{}` adds the leading layer axis L.
    """

    path: tuple[str, ...]
    name: str
    theirs: str
    ours: str

    @property
    def stacked(self) -> bool:
        return "{}" in self.name


_LAYER = "model.layers.{}."
WEIGHTS = (
    Weight(("embed",), "model.embed_tokens.weight", "V D", "V D"),
    Weight(("layers", "attn_norm"), _LAYER + "input_layernorm.weight", "D", "D"),
    Weight(("layers", "q"), _LAYER + "self_attn.q_proj.weight", "NH D", "D N H"),
    Weight(("layers", "q_bias"), _LAYER + "self_attn.q_proj.bias", "NH", "N H"),
    Weight(("layers", "k"), _LAYER + "self_attn.k_proj.weight", "KH D", "D K H"),
    Weight(("layers", "k_bias"), _LAYER + "self_attn.k_proj.bias", "KH", "K H"),
    Weight(("layers", "v"), _LAYER + "self_attn.v_proj.weight", "KH D", "D K H"),
    Weight(("layers", "v_bias"), _LAYER + "self_attn.v_proj.bias", "KH", "K H"),
    Weight(("layers", "q_norm"), _LAYER + "self_attn.q_norm.weight", "H", "H"),
    Weight(("layers", "k_norm"), _LAYER + "self_attn.k_norm.weight", "H", "H"),
    Weight(("layers", "o"), _LAYER + "self_attn.o_proj.weight", "D NH", "N H D"),
    Weight(("layers", "mlp_norm"), _LAYER + "post_attention_layernorm.weight", "D", "D"),
    Weight(("layers", "gate"), _LAYER + "mlp.gate_proj.weight", "F D", "D F"),
    Weight(("layers", "up"), _LAYER + "mlp.up_proj.weight", "F D", "D F"),
    Weight(("layers", "down"), _LAYER + "mlp.down_proj.weight", "D F", "F D"),
    Weight(("final_norm",), "model.norm.weight", "D", "D"),
    Weight(("lm_head",), "lm_head.weight", "V D", "V D"),
)


def weights(cfg: ModelConfig) -> list[Weight]:
    """The lines of the table that a model with this config has."""
    absent = set()
    if not cfg.attention_bias:
        absent |= {"q_bias", "k_bias", "v_bias"}
    if not cfg.qk_norm:
        absent |= {"q_norm", "k_norm"}
    if cfg.tie_embeddings:
        absent.add("lm_head")
    return [weight for weight in WEIGHTS if weight.path[-1] not in absent]


class Layout:
    """The shapes of one `Weight` for one config, and the way between the two orders of axes."""

    def __init__(self, weight: Weight, cfg: ModelConfig):
        sizes = {
            "V": cfg.vocab_size,
            "D": cfg.hidden_size,
            "N": cfg.num_heads,
            "K": cfg.num_kv_heads,
            "H": cfg.head_dim,
            "F": cfg.intermediate_size,
        }
        letters = weight.theirs.replace(" ", "")
        ours = weight.ours.split()
        self._expanded = tuple(sizes[letter] for letter in letters)
        self._order = tuple(letters.index(letter) for letter in ours)
        self._inverse = tuple(ours.index(letter) for letter in letters)
        self.theirs = tuple(math.prod(sizes[x] for x in group) for group in weight.theirs.split())
        self.ours = tuple(sizes[letter] for letter in ours)
        self.layers = cfg.num_layers if weight.stacked else 0
        self.leaf = ((self.layers,) if weight.stacked else ()) + self.ours

    def names(self, weight: Weight) -> list[str]:
        """The tensor of every layer, or the one tensor."""
        return [weight.name.format(i) for i in range(self.layers)] or [weight.name]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """A view of a Hugging Face tensor in our order of axes."""
        return tensor.reshape(self._expanded).transpose(self._order)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        return array.transpose(self._inverse).reshape(self.theirs)
