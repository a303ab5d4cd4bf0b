"""What compiled programs do with whole caches, read from their text.

    python tests/compiled_caches.py TARGET      # 'cpu:4', 'h200:1', 'v5e:2x2'; prints JSON

A target that is not here is compiled for all the same: see `oel_jax/plan/targets.py`. Nothing is
allocated, so the caches have the size of real ones: a compiler treats small ones in other ways.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from oel_jax.config.defaults import default
from oel_jax.distill.packing import Shape
from oel_jax.models.config import ModelConfig
from oel_jax.parallel.mesh import make_mesh
from oel_jax.plan.programs import Arrays, programs
from oel_jax.plan.targets import find
from oel_jax.plan.workload import Layout, Workload
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.sampling import RowSampling
from oel_jax.sampler.slots import Admission, admit, copy_slots, put_prefix

# Key heads and their width: Qwen3, Llama-3.2, and SmolLM2, whose heads fill no tile of a TPU.
HEADS = {"qwen3": (2, 128), "llama": (8, 64), "smollm2": (3, 64)}
SLOTS, LENGTH, KNOWLEDGE, LAYERS = 32, 16_384, 17_408, 5
PROGRAMS = (
    "prefill, play with knowledge",
    "decode, play with knowledge",
    "read a text, play with knowledge",
    "micro-batch",
)

_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b[a-z]\w*\[([\d,]*)\](\{[^}]*\})?")
# A TPU's compiler may fetch a bank that fits there once, to read it from there many times.
_ON_CHIP = "S(1)"
# What works in place, or is no work at all. A fusion is judged by the instructions in it.
_IN_PLACE = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "while",
    "conditional",
    "call",
    "bitcast",
    "scatter",
    "dynamic-update-slice",
    "fusion",
    "optimization-barrier",
}
# Layers are collected in an array that is made for them.
_COLLECTS = {"broadcast", "copy", "custom-call"}


@dataclass(frozen=True)
class Found:
    """One program.

    Attributes:
      temporary: bytes, by the compiler's count.
      cache: bytes of the keys of one device, which is half of its cache.
      changes: instructions that make another array of the size of a cache, or of a text's keys.
    """

    program: str
    temporary: int
    cache: int
    changes: tuple[str, ...]


def model(heads: str) -> ModelConfig:
    """Five layers of a model with these key heads."""
    kv_heads, head_dim = HEADS[heads]
    return ModelConfig(
        family="llama",
        vocab_size=512,
        hidden_size=256,
        num_layers=LAYERS,
        num_heads=2 * kv_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=512,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        rope_scaling=None,
        tie_embeddings=True,
        attention_bias=False,
        qk_norm=False,
        max_positions=8192,
    )


def changes(text: str, caches: list[tuple[int, ...]], allowed: set[str]) -> list[str]:
    """Instructions of a program's text, not in `allowed`, whose result is another cache.

    That is an array with the dimensions of one of `caches`, in whatever order, or a larger one.
    """
    shapes = [sorted(n for n in shape if n > 1) for shape in caches]
    largest, found = max(map(math.prod, caches)), []
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None or match[2] in allowed:
            continue
        for dims, layout in _ARRAY.findall(match[1]):
            if _ON_CHIP in layout:
                continue
            shape = [int(n) for n in dims.split(",") if n]
            if math.prod(shape) > largest or sorted(n for n in shape if n > 1) in shapes:
                found.append(f"{match[2]} {match[1]}")
                break
    return found


def _others(a: Arrays, state) -> dict:
    """Programs of the sampler that the planner does not list, lowered."""
    mesh, rows = a.layout.mesh, a.work.play.prefill_rows
    number = partial(a.rows, mesh, rows)
    group = jax.ShapeDtypeStruct((), jnp.int32)
    how = RowSampling(number(dtype=jnp.float32), number(), number(dtype=jnp.float32))
    key, stops = number(2, dtype=jnp.uint32), number(state.stops.shape[1])
    new = Admission(*[number()] * 4, key, number(), how, stops)
    return {
        "put a text": lambda: put_prefix.lower(state, group, a.knowledge()),
        "copy slots": lambda: copy_slots.lower(state, number(), number(), width=256),
        "admit": lambda: admit.lower(state, new),
    }


def look(
    mesh: jax.sharding.Mesh, dtype: str, heads: str, names: tuple[str, ...] = PROGRAMS
) -> list[Found]:
    """The programs that are given a cache or make one, compiled for a mesh."""
    config, cfg = default(), model(heads)
    config.model.dtype, config.loss.chunk = dtype, 64
    slots = SamplerConfig(
        slots=SLOTS, length=LENGTH, response=64, longest_prefix=KNOWLEDGE, prefill_chunk=64
    )
    shape = Shape(mesh.shape["fsdp"], 128, 64)
    work = Workload(slots, slots, None, KNOWLEDGE, 1, shape, shape, 1, 1.0)
    with jax.set_mesh(mesh):
        arrays = Arrays(config, cfg, Layout(mesh, mesh, 1), work)
        state = arrays.state(cfg, slots)
        made = {one.name: one.lower for one in programs(arrays) if one.name in names}
        made |= _others(arrays, state)
        return [_found(name, lower, arrays, state) for name, lower in made.items()]


def _found(name: str, lower, arrays: Arrays, state) -> Found:
    keys, bank, text = state.cache.keys, state.bank.keys, arrays.knowledge().keys
    caches = [x.sharding.shard_shape(x.shape) for x in (keys, bank, text)]
    program = lower().compile()
    allowed = _IN_PLACE | _COLLECTS if name.startswith("read a text") else _IN_PLACE
    return Found(
        name,
        int(program.memory_analysis().temp_size_in_bytes),
        math.prod(caches[0]) * keys.dtype.itemsize,
        tuple(changes(program.as_text(), caches, allowed)),
    )


def main(target: str) -> None:
    """Print what is found for both dtypes and all heads on a target."""
    found_target = find(target)
    devices = list(found_target.devices)
    if not devices:
        sys.exit(f"{target} cannot be compiled for: {found_target.why}")
    found = []
    for dtype, heads in (("float32", "qwen3"), *(("bfloat16", heads) for heads in HEADS)):
        tp = 2 if len(devices) > 1 and HEADS[heads][0] % 2 == 0 else 1
        mesh = make_mesh(len(devices) // tp, tp, devices)
        names = PROGRAMS if (dtype, heads) == ("bfloat16", "qwen3") else PROGRAMS[:3]
        for one in look(mesh, dtype, heads, names):
            found.append([dtype, heads, one.program, one.temporary, one.cache, one.changes])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
