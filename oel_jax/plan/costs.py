"""What a program computes, reads and sends, counted by hand; bytes and FLOPs of one device.

The compiler's own counts take the body of a loop once, and nearly everything here is in loops over
layers, tiles and chunks. So FLOPs are those of the matrix products, padding included, as the code
does them; bytes are the weights, caches and activations that pass through memory at least. The
tests compare FLOPs with the compiler's for one layer, and with a count product by product. What a
program sends is read from its compiled text; where there is none, the estimate here is used.
"""

import math
from dataclasses import dataclass

from oel_jax.models.attention import key_tile
from oel_jax.models.config import ModelConfig
from oel_jax.plan.programs import Arrays, Program
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.slots import cache_block


@dataclass(frozen=True)
class Cost:
    """Of one run of a program on one device: FLOP, bytes through memory, bytes from others."""

    flops: float
    bytes: float
    sent: float


def layer_weights(cfg: ModelConfig) -> int:
    """Elements of one layer's matrices."""
    heads = (2 * cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    return cfg.hidden_size * (heads + 3 * cfg.intermediate_size)


def parameters(cfg: ModelConfig) -> int:
    """All parameters, norms and biases included."""
    bias = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim if cfg.attention_bias else 0
    norms = 2 * cfg.hidden_size + (2 * cfg.head_dim if cfg.qk_norm else 0)
    tables = cfg.vocab_size * cfg.hidden_size * (1 if cfg.tie_embeddings else 2)
    return cfg.num_layers * (layer_weights(cfg) + norms + bias) + tables + cfg.hidden_size


def own_pairs(tokens: int, block: int) -> int:
    """(query, key) pairs of the tiles that attention works on where one segment fills the row.

    A packed row takes fewer, by how its segments fall: this is the most it can take.
    """
    queries, keys = min(block, tokens), key_tile(tokens)
    tiles, last = -(-tokens // queries), -(-tokens // keys)
    reach = sum(min(-(-(i + 1) * queries // keys), last) for i in range(tiles))
    return queries * keys * reach


def prefix_pairs(tokens: int, prefix: int, block: int) -> int:
    """The same for a shared prefix that every query sees whole."""
    queries = min(block, tokens)
    keys = key_tile(prefix)
    return -(-tokens // queries) * queries * -(-prefix // keys) * keys


def layers_flops(cfg: ModelConfig, tokens: int, pairs: int) -> float:
    """All layers, forward: `tokens` through the matrices, `pairs` of queries and keys."""
    attention = 4 * cfg.num_heads * cfg.head_dim * pairs
    return cfg.num_layers * (2.0 * layer_weights(cfg) * tokens + attention)


def head_flops(cfg: ModelConfig, tokens: int) -> float:
    """One product of hidden states and output matrix."""
    return 2.0 * cfg.vocab_size * cfg.hidden_size * tokens


class _Counter:
    """Costs on one mesh; `item` bytes of a number in the compute dtype.

    `whole`: the layers' weights are not split over 'fsdp', so that none are gathered.
    """

    def __init__(self, cfg: ModelConfig, fsdp: int, tp: int, item: int, whole: bool = False):
        self.cfg, self.fsdp, self.tp, self.item, self.whole = cfg, fsdp, tp, item, whole

    @property
    def gathered(self) -> float:
        """Bytes of all layers' weights as one device sees them."""
        return self.cfg.num_layers * layer_weights(self.cfg) / self.tp * self.item

    @property
    def _foreign(self) -> float:
        """Share of gathered weights that comes from other devices."""
        return (self.fsdp - 1) / self.fsdp

    def weights(self, passes: float) -> tuple[float, float]:
        """(bytes, sent) of `passes` passes over the layers' weights."""
        if self.whole:
            return passes * self.gathered, 0.0
        moved = self.gathered * (2 if self.fsdp > 1 else 0)  # gathered ones are written and read
        return passes * (self.gathered + moved), passes * self.gathered * self._foreign

    def activations(self, tokens: float, passes: float) -> tuple[float, float]:
        """(bytes, sent) of `tokens` tokens of one device through all layers."""
        cfg = self.cfg
        heads = (2 * cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
        wide = 10 * cfg.hidden_size + (3 * heads + 5 * cfg.intermediate_size) / self.tp
        reduced = 2 * 2 * cfg.hidden_size * (self.tp - 1) / self.tp  # two all-reduces of a ring
        layers = cfg.num_layers * tokens * passes * self.item
        return layers * wide, layers * reduced

    @property
    def cache(self) -> float:
        """Bytes of a position's keys and values in all layers, on one device."""
        cfg = self.cfg
        return cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * 2 * self.item / self.tp

    def prefix(self, tokens: float) -> tuple[float, float]:
        """(bytes, sent) of gathering an encoded text, whose positions all devices share."""
        size = self.cache * tokens
        return size * (3 if self.fsdp > 1 else 1), size * self._foreign

    def head(self, tokens: float, products: int) -> tuple[float, float]:
        """(bytes, sent) of logits of `tokens` tokens of one device, float32, as rows and slices."""
        cfg, devices = self.cfg, self.fsdp * self.tp
        logits = tokens * cfg.vocab_size * 4 / self.tp
        matrix = cfg.vocab_size * cfg.hidden_size * self.item / devices
        sent = logits * (devices - 1) / devices + (matrix if self.fsdp > 1 else 0.0)
        return products * (6 * logits + 2 * matrix), products * sent


def cost(program: Program, arrays: Arrays) -> Cost:
    """Of one run of a program; of `decode`, of one step of the slots."""
    stage, cfg = program.stage, arrays.cfg
    if stage == "extract":
        cfg = arrays.extractor
    fsdp, tp = program.mesh.shape["fsdp"], program.mesh.shape["tp"]
    kind = program.name.partition(",")[0]
    played = kind in ("prefill", "decode") or (kind == "read a text" and "policy" in program.given)
    whole = played and arrays.config.sampler.weights == "whole"
    count = _Counter(cfg, fsdp, tp, arrays.dtype.dtype.itemsize, whole)
    if kind in ("prefill", "decode"):
        return _sampling_cost(count, kind, program, _slots(arrays, stage))
    if kind == "read a text":
        return _reading_cost(count, program, arrays.config.model.attention_block)
    if kind in ("micro-batch", "choice of turns"):
        return _training_cost(count, program, arrays, learns=kind == "micro-batch")
    if kind == "cast":
        return Cost(0.0, sum(program.bytes.values()) * 1.5, 0.0)
    if kind == "export gather":
        size = sum(program.bytes.values())
        return Cost(0.0, size * (1 + fsdp * tp), size * (fsdp * tp - 1.0))
    moved = sum(program.bytes.values())
    return Cost(moved / 4 * 5, moved + sum(program.bytes[k] for k in ("student", "optimizer")), 0.0)


def _slots(arrays: Arrays, stage: str) -> SamplerConfig:
    work = arrays.work
    named = {"play with knowledge": work.informed, "extract": work.extractor}
    return named.get(stage) or work.play


def _sampling_cost(count: _Counter, kind: str, program: Program, s: SamplerConfig) -> Cost:
    rows, tokens, seen = program.sizes
    cfg, here = count.cfg, program.sizes[0] / count.fsdp
    # Whole blocks of the cache are read, as far as the longest slot reaches.
    block = cache_block(s.length)
    keys = math.ceil((seen - s.longest_prefix) / block) * block + s.longest_prefix
    flops = layers_flops(cfg, rows * tokens, rows * tokens * keys) / (count.fsdp * count.tp)
    size = count.cache * here * (keys - s.longest_prefix)
    parts = [(size, 0.0), count.weights(1), count.activations(here * tokens, 1)]
    if kind == "prefill":  # one prefix is gathered layer by layer; decoding reads one's own part
        parts.append(count.prefix(s.longest_prefix))
    else:
        parts.append((count.cache * s.prefixes * s.longest_prefix / count.fsdp, 0.0))
    if kind == "decode":
        flops += head_flops(cfg, rows * tokens) / (count.fsdp * count.tp)
        parts.append(count.head(here * tokens, 1))
    return _sum(flops, parts)


def _reading_cost(count: _Counter, program: Program, block: int) -> Cost:
    rows, tokens, _ = program.sizes  # one row a device along fsdp, all of them the same
    flops = layers_flops(count.cfg, rows * tokens, rows * own_pairs(tokens, block))
    parts = [count.weights(1), count.activations(tokens * rows / count.fsdp, 1)]
    return _sum(flops / (count.fsdp * count.tp), parts)


def _training_cost(count: _Counter, program: Program, arrays: Arrays, learns: bool) -> Cost:
    """Teacher forward with knowledge; student forward, again for remat, and backward."""
    rows, tokens, responses = program.sizes
    cfg, config = count.cfg, arrays.config
    block, step = config.model.attention_block, config.consolidate
    own, prefix = own_pairs(tokens, block), prefix_pairs(tokens, arrays.work.knowledge, block)
    plain = layers_flops(cfg, tokens, own)
    informed = layers_flops(cfg, tokens, own + prefix)
    # Backward: both products of every weight (with an adapter the weight's own gradient is not
    # needed); scores again and four more of attention.
    products = 2.0 if arrays.lora else 4.0
    back = cfg.num_layers * (
        products * layer_weights(cfg) * tokens + 10 * cfg.num_heads * cfg.head_dim * own
    )
    again = {"none": 0.0, "products": 0.0, "layer": plain}[step.remat]
    flops, passes, more = informed + plain, 2, 0
    if learns:
        flops += back + again
        # The layer that is computed again and its backward pass share the gathered weights.
        passes, more = 3, int(again > 0)
        if step.retention == "plain":
            flops, passes = flops + plain, passes + 1
        if arrays.config.consolidate.retention == "knowledge" or step.teacher == "trust_region":
            flops, passes = flops + informed, passes + 1
    flops = (flops * rows + head_flops(cfg, rows * responses) * (4 if learns else 2)) / (
        count.fsdp * count.tp
    )
    here = rows / count.fsdp
    parts = [count.weights(passes), count.activations(here * tokens, passes + more)]
    parts.append(count.head(here * responses, 4 if learns else 2))
    parts.append(count.prefix(arrays.work.knowledge))
    if (
        learns and not arrays.lora
    ):  # gradients: reduced over fsdp in float32, added to what is there
        size = cfg.num_layers * layer_weights(cfg) / count.tp
        parts.append((size / count.fsdp * 12, size * 4 * count._foreign))
    return _sum(flops, parts)


def _sum(flops: float, parts: list[tuple[float, float]]) -> Cost:
    return Cost(flops, sum(moved for moved, _ in parts), sum(sent for _, sent in parts))


# --- memory, where nothing was compiled -----------------------------------------------------------


def rough_temporaries(program: Program, arrays: Arrays) -> int:
    """Bytes of a program's temporaries on one device, by rule of thumb.

    To choose among many meshes; the choice is then compiled. Counted: what the layers keep for the
    backward pass, a few of a layer's activations, weights of three layers as they are gathered,
    gradients and the student in the compute dtype, the output matrix spread over the devices, and
    a chunk's logits.
    """
    cfg = arrays.extractor if program.stage == "extract" else arrays.cfg
    fsdp, tp = program.mesh.shape["fsdp"], program.mesh.shape["tp"]
    item, devices = arrays.dtype.dtype.itemsize, fsdp * tp
    kind = program.name.partition(",")[0]
    if kind in ("cast", "update"):
        return 0
    if kind == "export gather":
        return sum(program.bytes.values()) * fsdp * tp
    rows, tokens, _ = program.sizes
    here = rows / fsdp * tokens
    heads = (2 * cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    wide = 8 * cfg.hidden_size + (3 * heads + 4 * cfg.intermediate_size) / tp
    weights = 3 * layer_weights(cfg) / tp * item if fsdp > 1 else 0
    table = cfg.vocab_size * cfg.hidden_size / devices
    found = weights + here * wide * item
    if kind == "decode":
        found += table * item + 6 * here * cfg.vocab_size / tp * 4
    if kind == "read a text":
        keys = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim / tp
        found += 2 * here * keys * item
    if kind in ("micro-batch", "choice of turns"):
        chunk = min(arrays.config.loss.chunk or 1024, rows * program.sizes[2])
        found += 2 * table * item + 6 * chunk / devices * cfg.vocab_size * 4
        found += 2 * rows / fsdp * program.sizes[2] * cfg.hidden_size * item
    if kind == "micro-batch":
        each = {"none": wide, "products": wide, "layer": cfg.hidden_size}
        found += cfg.num_layers * here * each[arrays.config.consolidate.remat] * item
        trained = 0 if arrays.lora else parameters(cfg) / devices
        found += trained * (4 + item) + 2 * table * 4 + 2 * here * wide * item
    return int(found)
