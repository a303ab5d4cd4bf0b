"""What compiled programs send between devices, and what each device holds, read from their text.

The shapes are small, but in the proportions of a real model on many devices: a vocabulary much
larger than an MLP, which no device may ever see whole, and a number of ids that they do not divide.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.config.defaults import default
from oel_jax.distill.packing import Shape
from oel_jax.models.config import ModelConfig
from oel_jax.parallel.mesh import make_mesh
from oel_jax.plan.collectives import array_bytes, parse
from oel_jax.plan.programs import Arrays, programs
from oel_jax.plan.workload import Layout, Workload
from oel_jax.sampler.config import SamplerConfig

pytestmark = pytest.mark.mesh

VOCABULARY, WIDTH, MLP, LAYERS, KEY_HEADS, KNOWLEDGE = 8212, 64, 4224, 3, 4, 1024
CFG = ModelConfig(
    family="qwen3",
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_layers=LAYERS,
    num_heads=8,
    num_kv_heads=KEY_HEADS,
    head_dim=16,
    intermediate_size=MLP,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_scaling=None,
    tie_embeddings=False,
    attention_bias=False,
    qk_norm=True,
    max_positions=4096,
)
PREFILL, DECODE, KNOWLEDGE_READ, STUDENT, UPDATE = NAMES = [
    "prefill, play with knowledge",
    "decode, play with knowledge",
    "read a text, rollouts",
    "micro-batch",
    "update",
]
_TYPE = re.compile(r"\b[a-z]\w*\[[\d,]*\]")
_WHILE = re.compile(r"= \((.*?)\) while\(")


@pytest.fixture(scope="module", params=[(8, 1), (4, 2), (2, 4)], ids=str)
def compiled(request):
    """(mesh, name -> compiled program)."""
    mesh = make_mesh(*request.param)
    config = default()
    config.model.dtype, config.loss.chunk = "float32", 64
    slots = SamplerConfig(
        slots=16, response=32, length=128, longest_prefix=KNOWLEDGE, prefill_chunk=32
    )
    shape = Shape(mesh.shape["fsdp"], 64, 32)
    work = Workload(slots, slots, None, KNOWLEDGE, 1, shape, shape, 1, 1.0)
    with jax.set_mesh(mesh):
        made = programs(Arrays(config, CFG, Layout(mesh, mesh, 1), work))
        found = {one.name: one.lower().compile() for one in made if one.name in NAMES}
    assert sorted(found) == sorted(NAMES)
    return mesh, found


def layer_gather(mesh):
    """Bytes of the largest weight of a layer, gathered over 'fsdp'."""
    return WIDTH * MLP * 4 // mesh.shape["tp"]


def sizes_of(types):
    return [array_bytes(each) for each in _TYPE.findall(types)]


def local_size(leaf):
    """Elements on one device."""
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape)))


@pytest.mark.parametrize("name", NAMES)
def test_no_collective_exceeds_the_gather_of_one_weight(compiled, name):
    mesh, found = compiled
    limit = layer_gather(mesh)
    if name == KNOWLEDGE_READ:  # tp adds up the hidden states of a text
        limit = max(limit, KNOWLEDGE * WIDTH * 4)
    sent = parse(found[name].as_text(), mesh.size)
    assert sent or name == UPDATE
    for one in sent:
        sizes = sizes_of(one.shape)
        # The compiler lists what it does in one go; of an exchange these are the parts of one.
        largest = sum(sizes) if one.kind == "all-to-all" else max(sizes)
        assert largest <= limit, one


@pytest.mark.parametrize("name", NAMES)
def test_neither_vocabulary_nor_knowledge_is_ever_whole(compiled, name):
    """No operation, no loop and no argument has one of them, in whatever order of dimensions."""
    mesh, found = compiled
    tp = mesh.shape["tp"]
    heads = KEY_HEADS // tp
    for each in set(_TYPE.findall(found[name].as_text())):
        dims = [int(n) for n in each[each.index("[") + 1 : -1].split(",") if n]
        elements = int(np.prod(dims))
        assert not (VOCABULARY // tp in dims and WIDTH in dims), each
        assert not (VOCABULARY in dims and elements > 64 // mesh.size * VOCABULARY), each
        if KNOWLEDGE in dims and name != KNOWLEDGE_READ:
            assert elements <= KNOWLEDGE * heads * CFG.head_dim or LAYERS not in dims, each


@pytest.mark.parametrize("name", NAMES)
def test_nothing_large_lies_on_two_devices(compiled, name):
    """Arguments and results: what has copies is less than 1 % of what a device holds."""
    mesh, found = compiled
    program = found[name]
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    leaves = jax.tree.leaves((program.in_avals, program.out_info))
    assert len(leaves) > 5
    for leaf in leaves:
        mine = local_size(leaf)
        copies = mine * mesh.size // max(leaf.size, 1)
        # 'tp' shares rows and norms: they are split over 'fsdp', or tiny.
        few = leaf.size * leaf.dtype.itemsize // mesh.shape["fsdp"] if leaf.ndim > 1 else 0
        size = mine * jnp.dtype(leaf.dtype).itemsize
        assert copies == 1 or size <= max(held // 100, few), leaf


@pytest.mark.parametrize("name", NAMES)
def test_loops_carry_no_more_than_one_piece(compiled, name):
    """A loop holds at most the device's part of an argument, or one layer's weight."""
    mesh, found = compiled
    program = found[name]
    limit = layer_gather(mesh)
    if name == KNOWLEDGE_READ:
        limit = KNOWLEDGE * MLP * 4 // mesh.shape["tp"]  # the text's own activations
    limit = max(limit, *(4 * local_size(leaf) for leaf in jax.tree.leaves(program.in_avals)))
    limit += limit // 50  # the rows that fill up a slice of the vocabulary
    for types in _WHILE.findall(program.as_text()):
        assert max(sizes_of(types), default=0) <= limit, types
