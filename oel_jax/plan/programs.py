"""The jitted functions of a run, lowered for devices that are not at hand.

Every program here is a function that the run itself calls, with arrays of the shapes and placements
that follow from the config; nothing is computed. What a program is given is kept apart by class
(parameters, optimizer, KV cache, ...), so that bytes can be told apart as well.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax import P

from oel_jax.distill.lora import Lora, abstract_adapter, adapter_shardings
from oel_jax.distill.optimizer import make_optimizer
from oel_jax.distill.packing import MicroBatch, Shape, View
from oel_jax.distill.step import accumulate, cast, sensitivity, update
from oel_jax.learner.settings import step_settings
from oel_jax.models.cache_storage import platform_of, stored_dtype
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import KeyValues, abstract_params, param_shardings
from oel_jax.models.language_model import DTYPES
from oel_jax.models.lengths import padded_length
from oel_jax.models.shared_prefix import PREFIX, encode_rows
from oel_jax.parallel.mesh import device_bytes, spec, whole_place
from oel_jax.parallel.offload import HOST, offloaded_parts
from oel_jax.plan.workload import Layout, Workload
from oel_jax.runs.policies import sampler_params
from oel_jax.runs.samplers import sampling
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.decode import decode
from oel_jax.sampler.prefill import Piece, extend
from oel_jax.sampler.requests import Sampling
from oel_jax.sampler.slots import SlotState, abstract_state

# Stages, in the order of a round; what lives together is counted for each.
STAGES = ("play", "play with knowledge", "extract", "resume", "rollouts", "update", "export")


@dataclass(frozen=True)
class Program:
    """One jitted function with its shapes.

    Attributes:
      name: what the report calls it.
      stage: one of `STAGES`.
      mesh: the devices it is compiled for.
      given: its arguments by class; bytes are counted from them.
      lower: gives what `.compile()` is called on.
      sizes: for `costs`: (slots or rows, tokens of each, keys that they see).
    """

    name: str
    stage: str
    mesh: jax.sharding.Mesh
    given: dict[str, Any]
    lower: Callable[[], Any] = field(repr=False)
    sizes: tuple[int, ...] = ()

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes on one device, by class."""
        return {name: device_bytes(tree) for name, tree in self.given.items()}


_shapes = lru_cache(maxsize=16)(abstract_params)  # a search asks for them again and again


def _placed(shapes: Any, places: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place), shapes, places
    )


class Arrays:
    """Shapes with placements, in place of the arrays of a run."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        cfg: ModelConfig,
        layout: Layout,
        work: Workload,
        extractor: ModelConfig | None = None,
    ):
        self.config, self.cfg, self.layout, self.work = config, cfg, layout, work
        self.extractor = extractor or cfg
        self.dtype = DTYPES[config.model.dtype]
        self.lora = Lora.of(config.lora)
        teacher_dtype = DTYPES[config.consolidate.teacher_dtype or config.model.dtype]
        self.teacher = self._params(cfg, teacher_dtype, layout.mesh)
        self.policy = self.played_with(self._params(cfg, self.dtype, layout.host))
        if self.lora:
            self.masters = self._adapter(jnp.float32, layout.mesh)
        else:
            self.masters = self._params(cfg, jnp.float32, layout.mesh)
        self.tx = make_optimizer(config.consolidate)
        self.moments = self._moments()

    @staticmethod
    def _params(cfg: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh) -> Any:
        return _placed(_shapes(cfg, dtype), param_shardings(cfg, mesh), dtype)

    def played_with(self, params: Any) -> Any:
        """Weights in the form in which the sampler reads them."""

        def gathered(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            place = whole_place(leaf.sharding)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return sampler_params(self.config, params, lambda tree: jax.tree.map(gathered, tree))

    @property
    def copy(self) -> int:
        """Bytes of one device that the student's weights take in the compute dtype."""
        return device_bytes(self._params(self.cfg, self.dtype, self.layout.mesh))

    def _adapter(self, dtype: Any, mesh: jax.sharding.Mesh) -> Any:
        shapes = abstract_adapter(self.cfg, self.lora)
        return _placed(shapes, adapter_shardings(self.lora, mesh), dtype)

    def answering(self) -> Any:
        """What the student computes its answers with, on the devices of one process."""
        if not self.lora:
            return self.policy
        adapter = self._adapter(self.dtype, self.layout.host)
        split = self._params(self.cfg, self.dtype, self.layout.host)
        return self.played_with(split | {"layers": split["layers"] | {"lora": adapter}})

    def _moments(self) -> Any:
        """The optimizer's state, placed as `jax.jit(tx.init)` places it: like the parameters."""
        whole = jax.NamedSharding(self.layout.mesh, P())
        places = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(self.masters)}
        kind = HOST if "optimizer" in offloaded_parts(self.config.consolidate) else "device"
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype,
                sharding=places.get(leaf.shape, whole).with_memory_kind(kind),
            ),
            jax.eval_shape(self.tx.init, self.masters),
        )

    def array(self, mesh: jax.sharding.Mesh, dtype: Any, shape: tuple[int, ...], *names: Any):
        """One array, its dimensions named as in `oel_jax.parallel.mesh.RULES`."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec(*names)))

    def rows(self, mesh: jax.sharding.Mesh, count: int, *rest: int, dtype: Any = jnp.int32):
        """[count, *rest], rows split over the devices."""
        return self.array(mesh, dtype, (count, *rest), "batch", *[None] * len(rest))

    def state(self, cfg: ModelConfig, s: SamplerConfig) -> SlotState:
        """The sampler's slots, on the devices of one process."""
        return abstract_state(cfg, self.layout.host, s)

    def knowledge(self) -> KeyValues:
        """One encoded text, as the teacher reads it."""
        cfg, mesh = self.cfg, self.layout.mesh
        width = self.work.knowledge + -self.work.knowledge % mesh.shape["fsdp"]  # as encode_prefix
        shape = (cfg.num_layers, cfg.num_kv_heads, width, cfg.head_dim)
        stored = stored_dtype(self.dtype, platform_of(mesh))
        side = jax.ShapeDtypeStruct(shape, stored, sharding=jax.NamedSharding(mesh, PREFIX))
        return KeyValues(side, side)

    def micro_batch(self, shape: Shape) -> MicroBatch:
        """Rows of student and teacher."""
        rows = partial(self.rows, self.layout.mesh, shape.rows)
        views = [
            View(*[rows(shape.tokens) for _ in range(4)], rows(shape.responses)) for _ in range(2)
        ]
        numbers = [rows(shape.responses, dtype=jnp.float32) for _ in range(3)]
        return MicroBatch(*views, rows(shape.responses), *numbers, rows(shape.responses))


def held(arrays: Arrays) -> dict[str, int]:
    """Bytes of one device that live through an optimizer step, named as in `consolidate`."""
    a, texts = arrays, arrays.work.texts
    away = offloaded_parts(a.config.consolidate)
    found = {
        "adapter, float32" if a.lora else "student, float32": device_bytes(a.masters),
        "AdamW's moments": 0 if "optimizer" in away else device_bytes(a.moments),
        "gradients, float32": device_bytes(a.masters),
        "teacher": device_bytes(a.teacher),
        "knowledge, encoded": texts * device_bytes(a.knowledge()),
        "rollout cache": device_bytes(a.state(a.cfg, a.work.play)),
    }
    if a.config.consolidate.teacher == "ema":
        found["teacher's average, float32"] = device_bytes(a.masters)
    return found


_SAVED = ("student", "adapter", "AdamW's moments", "teacher's average")


def living(arrays: Arrays) -> dict[str, dict[str, int]]:
    """Stage -> class -> bytes of one device that live while the stage's programs run."""
    a, work = arrays, arrays.work
    policy = device_bytes(a.policy)
    stages = {"play": {"policy": policy, "KV cache": device_bytes(a.state(a.cfg, work.play))}}
    if work.informed:
        cache = device_bytes(a.state(a.cfg, work.informed))
        stages["play with knowledge"] = {"policy": policy, "KV cache": cache}
    if work.extractor:
        weights = device_bytes(a.played_with(a._params(a.extractor, a.dtype, a.layout.host)))
        cache = device_bytes(a.state(a.extractor, work.extractor))
        stages["extract"] = {"policy": weights, "KV cache": cache}
    step = held(a)
    # A checkpoint is read while the fresh state that it replaces is still there.
    kept = {name: step[name] for name in step if name.split(",")[0] in _SAVED}
    stages["resume"] = kept | {"restored": sum(kept.values()), "teacher": step["teacher"]}
    # While the student answers there are no gradients, but a copy of it in the compute dtype.
    away = {"masters": "student, float32", "teacher": "teacher"}
    absent = {
        "gradients, float32",
        *(away.get(part) for part in offloaded_parts(a.config.consolidate)),
    }
    answering = {name: size for name, size in step.items() if name not in absent}
    if a.config.consolidate.mode == "on_policy":
        if a.lora:  # the teacher's own arrays, and the adapter
            copies = device_bytes(a._adapter(a.dtype, a.layout.mesh))
        else:
            copies = a.copy if a.config.model.dtype != "float32" else 0
        elsewhere = a.layout.processes > 1 or a.config.sampler.weights == "whole"
        copies += device_bytes(a.answering()) if elsewhere else 0
        answering["student's copy"] = copies
    stages["rollouts"] = answering
    if step_settings(a.config, a.cfg).own_view:
        step["student's copy"] = a.copy
        step["knowledge, the student's view"] = device_bytes(a.knowledge())
    stages["update"] = step
    if a.layout.processes > 1:
        export = held(a)
        stages["export"] = {k: v for k, v in export.items() if k != "gradients, float32"}
    return stages


# --- the programs ---------------------------------------------------------------------------------


def programs(arrays: Arrays) -> Iterator[Program]:
    """All programs that matter for memory or time, in the order of a round."""
    a, work, config = arrays, arrays.work, arrays.config
    yield from _sampling(a, "play", a.cfg, work.play, sampling(config.deploy))
    if work.informed:
        yield from _sampling(
            a, "play with knowledge", a.cfg, work.informed, sampling(config.evaluate)
        )
        yield _encoding(a, "play with knowledge", a.layout.host, a.policy)
    if work.extractor:
        yield from _sampling(a, "extract", a.extractor, work.extractor, sampling(config.extract))
    yield from _training(a)


def _sampling(
    a: Arrays, stage: str, cfg: ModelConfig, s: SamplerConfig, how: Sampling, weights: Any = None
) -> Iterator[Program]:
    """Reading a piece of some prompts, and writing a token of every slot."""
    mesh, state = a.layout.host, a.state(cfg, s)
    if weights is None:
        weights = a.policy if cfg is a.cfg else a.played_with(a._params(cfg, a.dtype, mesh))
    none = a.array(mesh, jnp.int32, ())
    chunk = padded_length(min(s.prefill_chunk, s.length - s.response))
    piece = Piece(
        a.rows(mesh, s.prefill_rows, chunk), *[a.rows(mesh, s.prefill_rows) for _ in range(4)], none
    )
    given = {"policy": weights, "KV cache": state}
    yield Program(
        f"prefill, {stage}",
        stage,
        mesh,
        given | {"batch": piece},
        lambda: extend.lower(cfg, weights, state, piece),
        (s.prefill_rows, chunk, s.length // 2 + s.longest_prefix),
    )
    # Which ids are padding is the tokenizer's business; it costs nothing.
    widths = (how.candidates(cfg.vocab_size),)
    static = {"limit": cfg.vocab_size, "widths": widths, "draft": s.draft}
    yield Program(
        f"decode, {stage}",
        stage,
        mesh,
        given,
        lambda: decode.lower(cfg, weights, state, none, **static),
        (s.slots, 1 + s.draft, s.length // 2 + s.longest_prefix),
    )


def _encoding(a: Arrays, stage: str, mesh: jax.sharding.Mesh, weights: Any) -> Program:
    """Reading a knowledge text once."""
    rows = mesh.shape["fsdp"]
    width = a.work.knowledge + -a.work.knowledge % rows
    batch = [a.rows(mesh, rows, width) for _ in range(3)]
    return Program(
        f"read a text, {stage}",
        stage,
        mesh,
        {"policy" if mesh is a.layout.host and stage != "rollouts" else "teacher": weights},
        lambda: encode_rows.lower(a.cfg, weights, *batch, block=a.config.model.attention_block),
        (rows, width, 0),
    )


def _training(a: Arrays) -> Iterator[Program]:
    """The student's answers, teacher and student on a micro-batch, and the update."""
    config, settings, mesh = a.config, a.config.consolidate, a.layout.mesh
    if settings.mode == "on_policy":
        how = Sampling(settings.temperature)
        yield from _sampling(a, "rollouts", a.cfg, a.work.play, how, a.answering())
    yield _encoding(a, "rollouts", mesh, a.teacher)
    masters = {"student": a.masters}
    if config.model.dtype != "float32" and not a.lora:
        yield Program(
            "cast",
            "rollouts",
            mesh,
            masters,
            lambda: cast.lower(a.masters, a.dtype),
        )
    step, text = step_settings(config, a.cfg), a.knowledge()
    own = text if step.own_view else None
    both = masters | {"teacher": a.teacher, "knowledge": (text, own)}
    for name, shape in (("micro-batch", a.work.widest), ("micro-batch, usual", a.work.usual)):
        if name != "micro-batch" and shape == a.work.widest:
            continue
        batch = a.micro_batch(shape)
        yield Program(
            name,
            "update",
            mesh,
            {"gradients": a.masters} | both | {"batch": batch},
            lambda batch=batch: accumulate.lower(
                a.masters, a.masters, a.teacher, text, batch, own, step=step
            ),
            (shape.rows, shape.tokens, shape.responses),
        )
    if settings.turn_fraction < 1 or settings.turn_floor > 0:
        batch = a.micro_batch(a.work.widest)
        yield Program(
            "choice of turns",
            "update",
            mesh,
            {"teacher": a.teacher, "knowledge": text, "batch": batch},
            lambda: sensitivity.lower(a.teacher, text, batch, step=step),
            (a.work.widest.rows, a.work.widest.tokens, a.work.widest.responses),
        )
    yield Program(
        "update",
        "update",
        mesh,
        masters | {"optimizer": a.moments, "gradients": a.masters},
        lambda: update.lower(
            a.masters, a.moments, a.masters, tx=a.tx, clip_norm=settings.clip_norm
        ),
    )
    if a.layout.processes > 1:
        yield _gathering(a)


def _gathering(a: Arrays) -> Program:
    """Export: the largest tensor, whole on every device, as `processes.to_numpy` asks for it."""
    table = a.teacher["embed"] if a.lora else a.masters["embed"]
    whole = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(a.layout.mesh, P()))
    given = {"teacher" if a.lora else "student": table}
    return Program("export gather", "export", a.layout.mesh, given, lambda: whole.lower(table))
