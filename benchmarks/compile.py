"""Compile the programs of a round for devices that are not at hand: seconds, bytes, FLOPs.

    python -m benchmarks.compile [--model=qwen3_8b] [--target=v5p:4x4x4] [--tp=1]

Needs `libtpu` (pip install "jax[tpu]") but no TPU. Bytes are the compiler's, and tell whether a
program fits one device; nothing here says how fast it is. (The compiler's own FLOPs and seconds
count the body of a loop once, and nearly everything is inside a loop over layers or chunks; they
are in the record, not in the table.)
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.experimental import topologies

from benchmarks import side_by_side
from benchmarks.models import SHAPES, hf_config
from benchmarks.side_by_side import finish
from oel_jax.distill.packing import MicroBatch, View
from oel_jax.distill.step import StepConfig, accumulate, optimizer, update
from oel_jax.distill.topk_kl import KLConfig
from oel_jax.errors import UserError
from oel_jax.lm.config import ModelConfig
from oel_jax.lm.model import KeyValues, abstract_params, param_shardings
from oel_jax.lm.sampling import Sampling
from oel_jax.lm.slots import Piece, SlotState, abstract_state, decode, extend
from oel_jax.parallel.mesh import make_mesh, spec


def target_mesh(target: str, tp: int) -> jax.sharding.Mesh:
    """A mesh over the devices of a topology such as 'v5e:4x4'.

    Raises:
      UserError: libtpu is missing, or it does not know the target.
    """
    try:
        topology = topologies.get_topology_desc(target, "tpu")
    except Exception as error:  # libtpu's own kinds of error
        raise UserError(
            f"--target={target}: no such topology, or libtpu is not installed "
            f'(pip install "jax[tpu]"): {str(error).splitlines()[0]}'
        ) from error
    return make_mesh(len(topology.devices) // tp, tp, topology.devices)


class Abstract:
    """Shapes with shardings, in place of the arrays of a run."""

    def __init__(self, options, mesh: jax.sharding.Mesh, cfg: ModelConfig):
        self.options, self.mesh, self.cfg = options, mesh, cfg
        places = param_shardings(cfg, mesh)
        self.masters, self.weights = (
            jax.tree.map(self._placed, abstract_params(cfg, dtype), places)
            for dtype in (jnp.float32, jnp.bfloat16)
        )

    def _placed(self, leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def array(self, dtype: Any, shape: tuple[int, ...], *logical: str | None) -> Any:
        """One array, its dimensions named as in `oel_jax.parallel.mesh.RULES`."""
        where = jax.sharding.NamedSharding(self.mesh, spec(*logical))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def rows(self, count: int, *rest: int, dtype: Any = jnp.int32) -> Any:
        """[count, *rest], rows split over the devices."""
        return self.array(dtype, (count, *rest), "batch", *[None] * len(rest))

    def state(self) -> SlotState:
        """The sampler's slots."""
        o = self.options
        sizes = (o.slots, o.context, o.response)
        return abstract_state(self.cfg, self.mesh, *sizes, jnp.bfloat16, shared=o.knowledge)

    def micro_batch(self) -> tuple[KeyValues, MicroBatch]:
        """One row a device, and the cached knowledge that the teacher reads."""
        o, rows = self.options, self.mesh.shape["fsdp"] * self.options.rows
        views = [
            View(*[self.rows(rows, o.tokens) for _ in range(4)], self.rows(rows, o.response))
            for _ in range(2)
        ]
        ids = self.rows(rows, o.response)
        numbers = [self.rows(rows, o.response, dtype=jnp.float32) for _ in range(3)]
        cfg = self.cfg
        shape = (cfg.num_layers, cfg.num_kv_heads, o.knowledge, cfg.head_dim)
        side = self.array(jnp.bfloat16, shape, None, "kv_heads", None, None)
        return KeyValues(side, side), MicroBatch(*views, ids, *numbers, ids)


def programs(shapes: Abstract) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and a function that lowers it, for each program of a round."""
    cfg, o = shapes.cfg, shapes.options
    rows = shapes.mesh.shape["fsdp"] * o.rows
    none = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(shapes.mesh, P()))
    piece = Piece(shapes.rows(rows, o.prefill), *[shapes.rows(rows) for _ in range(4)], none)
    yield "prefill", lambda: extend.lower(cfg, shapes.weights, shapes.state(), piece)
    how = {"how": Sampling(0.7), "limit": cfg.vocab_size, "stop_ids": (1,)}
    yield "decode", lambda: decode.lower(cfg, shapes.weights, shapes.state(), none, **how)
    step = StepConfig(cfg, KLConfig(256, 0.7, chunk=512), jnp.bfloat16, o.remat, 256)
    cache, batch = shapes.micro_batch()
    inputs = (shapes.masters, shapes.masters, shapes.weights, cache, batch)
    yield "consolidation micro-batch", lambda: accumulate.lower(*inputs, step=step)
    section = {"learning_rate": 1e-6, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
    section |= {"weight_decay": 0.01, "moments_dtype": "float32"}
    tx = optimizer(SimpleNamespace(**section))
    moments = _moments(tx, shapes)
    three = (shapes.masters, moments, shapes.masters)
    yield "AdamW update", lambda: update.lower(*three, tx=tx, clip_norm=1.0)


def _moments(tx: Any, shapes: Abstract) -> Any:
    """The optimizer's state, placed as its parameters are."""
    whole = jax.NamedSharding(shapes.mesh, P())
    places = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(shapes.masters)}
    state = jax.eval_shape(tx.init, shapes.masters)
    return jax.tree.map(lambda leaf: shapes._placed(leaf, places.get(leaf.shape, whole)), state)


def measure(lower: Callable[[], Any]) -> dict[str, float]:
    """Compile seconds, and what the compiler says of one device."""
    began = time.perf_counter()
    compiled = lower().compile()
    seconds = time.perf_counter() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        "compile_seconds": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": cost.get("flops", np.nan),
        "bytes_accessed": cost.get("bytes accessed", np.nan),
        "optimal_seconds": cost.get("optimal_seconds", np.nan),
    }


def main() -> int:
    """Command line; returns the exit status."""
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", default="qwen3_8b", choices=SHAPES)
    parser.add_argument("--target", default="v5p:4x4x4")
    parser.add_argument("--tp", type=int, default=1, help="devices that split heads and vocabulary")
    parser.add_argument("--slots", type=int, default=256, help="sequences decoded at once")
    parser.add_argument("--context", type=int, default=3584, help="tokens of a slot's cache")
    parser.add_argument("--knowledge", type=int, default=8192, help="tokens of a shared prefix")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of a prompt's piece")
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch, each device")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of such a row")
    parser.add_argument("--response", type=int, default=1024, help="response tokens at most")
    parser.add_argument("--remat", default="layer", help="as config.consolidate.remat")
    options = parser.parse_args()
    mesh = target_mesh(options.target, options.tp)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_text(json.dumps(hf_config(options.model)))
        cfg = ModelConfig.from_directory(Path(scratch))
    found = {}
    jax.config.update("jax_enable_compilation_cache", False)
    with jax.set_mesh(mesh):
        for name, lower in programs(Abstract(options, mesh, cfg)):
            found[name] = measure(lower)
            print(f"  {name}: {found[name]['compile_seconds']:.1f} s", flush=True)
    rows = [
        [
            name,
            f"{one['compile_seconds']:.1f}",
            f"{one['argument_bytes'] / 1e9:.2f}",
            f"{one['temporary_bytes'] / 1e9:.2f}",
        ]
        for name, one in found.items()
    ]
    total = sum(one["compile_seconds"] for one in found.values())
    print(f"compiled in {total:.0f} s; bytes are those of one device, by the compiler")
    settings = {"model": options.model, "target": options.target, "tp": options.tp}
    measured = {"programs": found, "compile_seconds": total, "options": vars(options) | {"out": ""}}
    headers = ["program", "compile s", "arguments GB", "temporaries GB"]
    return finish("compile", settings, rows, headers, [], measured, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
