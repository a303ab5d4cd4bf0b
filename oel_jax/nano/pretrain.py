"""Pre-train a nano model from scratch on procedurally generated worlds.

    python -m oel_jax.nano.pretrain --size=small --out=DIR --seed=0

Writes a Hugging Face directory (bf16) with tokenizer and `card.json` (seed, steps, time, loss per
task). The run keeps a checkpoint in DIR/state.npz; the same command goes on from there and ends in
the same weights as an uninterrupted run. Muon trains the matrices, Adam everything else.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from oel_jax.errors import UserError
from oel_jax.lm.config import ModelConfig
from oel_jax.lm.model import Params, forward, init_params, unembed
from oel_jax.nano import vocabulary
from oel_jax.nano.packing import TASK_NAMES, make_batch

_MATRICES = {
    "q": MuonDimensionNumbers(1, (2, 3)),
    "k": MuonDimensionNumbers(1, (2, 3)),
    "v": MuonDimensionNumbers(1, (2, 3)),
    "o": MuonDimensionNumbers((1, 2), 3),
    "gate": MuonDimensionNumbers(1, 2),
    "up": MuonDimensionNumbers(1, 2),
    "down": MuonDimensionNumbers(1, 2),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A member of the family and how long it is trained (rows of `length` tokens a step).

    The last `late` of the `steps` are the phase in which players draw conclusions.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    steps: int
    late: int
    rows: int = 10
    length: int = 320
    rate: float = 0.02
    adam_rate: float = 3e-3


EARLY = 0.14  # share of the steps that use the mixture `EARLY_TASKS`
SIZES = {"small": Size(hidden=128, layers=4, heads=4, kv_heads=2, mlp=384, steps=2600, late=700)}


def phase_of(size: Size, step: int, steps: int) -> str:
    """Which mixture of examples a step uses: 'early', 'main' or 'late'."""
    main = steps - size.late
    return "early" if step < EARLY * main else "main" if step < main else "late"


def hf_config(size: Size) -> dict[str, object]:
    """The `config.json` of a size."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary.VOCABULARY,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": vocabulary.special_id(vocabulary.STOP),
        "pad_token_id": vocabulary.special_id(vocabulary.END_OF_TEXT),
        "bos_token_id": None,
    }


@cache
def make_optimizer(size: Size, steps: int) -> optax.GradientTransformation:
    """Muon on the layers' matrices and Adam on the rest, both with warm-up and decay to zero.

    The late phase has a lower rise and fall of its own.
    """
    main = steps - size.late

    def schedule(peak: float) -> optax.Schedule:
        warm, hold = max(1, min(60, main // 10)), int(0.4 * main)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, warm),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0.0, max(1, main - hold)),
                optax.linear_schedule(0.0, 0.5 * peak, warm),
                optax.linear_schedule(0.5 * peak, 0.0, max(1, size.late - warm)),
            ],
            [warm, hold, main, main + warm],
        )

    def numbers(params: Params) -> Params:
        names: Params = jax.tree.map(lambda _: None, params)
        names["layers"] = {name: _MATRICES.get(name) for name in params["layers"]}
        return names

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(size.rate),
            adam_learning_rate=schedule(size.adam_rate),
            adam_b2=0.98,
            weight_decay=0.01,
            muon_weight_dimension_numbers=numbers,
        ),
    )


def loss(
    params: Params, batch: tuple[jax.Array, ...], cfg: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Weighted mean cross-entropy, and the mean over reply targets of each task [tasks]."""
    tokens, targets, positions, segments, weights, tasks = batch
    hidden = forward(cfg, params, tokens, positions, segments)
    logits = unembed(cfg, params, hidden)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    each = jax.nn.logsumexp(logits, axis=-1) - picked
    mine = jax.nn.one_hot(tasks, len(TASK_NAMES))
    per_task = (each[..., None] * mine).sum((0, 1)) / jnp.maximum(mine.sum((0, 1)), 1)
    return (each * weights).sum() / weights.sum(), per_task


@partial(jax.jit, static_argnames=("cfg", "optimizer"), donate_argnums=(0, 1))
def train_step(params, state, batch, cfg: ModelConfig, optimizer: optax.GradientTransformation):
    """One update; returns params, optimizer state, loss and loss per task."""
    (value, per_task), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, cfg)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value, per_task


class State:
    """Parameters and optimizer state, with their file."""

    def __init__(self, size: Size, steps: int, seed: int):
        self.cfg = ModelConfig.from_hf(hf_config(size))
        self.optimizer = make_optimizer(size, steps)
        self.identity = json.dumps({**dataclasses.asdict(size), "steps": steps, "seed": seed})
        self.params = jax.jit(lambda key: init_params(self.cfg, key))(jax.random.key(seed))
        self.state = jax.jit(self.optimizer.init)(self.params)
        self.step = 0
        self.seconds = 0.0

    def update(self, batch: tuple[np.ndarray, ...]) -> tuple[jax.Array, jax.Array]:
        """One step; returns loss and loss per task."""
        self.params, self.state, value, per_task = train_step(
            self.params, self.state, batch, self.cfg, self.optimizer
        )
        self.step += 1
        return value, per_task

    def save(self, path: Path) -> None:
        """Write everything, atomically."""
        leaves = jax.tree.leaves((self.params, self.state))
        scratch = path.with_suffix(".partial.npz")
        np.savez(
            scratch,
            identity=self.identity,
            step=self.step,
            seconds=self.seconds,
            **{f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)},
        )
        os.replace(scratch, path)

    def restore(self, path: Path) -> None:
        """Read what `save` wrote.

        Raises:
          UserError: the file belongs to a run with another size, length or seed.
        """
        with np.load(path, allow_pickle=False) as data:
            if str(data["identity"]) != self.identity:
                raise UserError(
                    f"{path} belongs to another run ({data['identity']}); this one is "
                    f"{self.identity}. Choose another --out or remove the file to start afresh."
                )
            leaves, tree = jax.tree.flatten((self.params, self.state))
            loaded = [jnp.asarray(data[f"leaf{i}"]) for i in range(len(leaves))]
            self.params, self.state = jax.tree.unflatten(tree, loaded)
            self.step, self.seconds = int(data["step"]), float(data["seconds"])


def run(
    size: Size,
    out: Path,
    seed: int,
    *,
    steps: int | None = None,
    stop: int | None = None,
    save_every: int = 250,
) -> State:
    """Train (or go on training) into `out`; returns the last state. Prints progress.

    `steps` is the length the rates are planned for; `stop` ends this call earlier, with a
    checkpoint from which the next call goes on.
    """
    steps = steps or size.steps
    stop = min(stop or steps, steps)
    encoder = vocabulary.Encoder(out)
    run_state = State(size, steps, seed)
    path = out / "state.npz"
    if path.exists():
        run_state.restore(path)
        print(f"going on from step {run_state.step}", flush=True)
    before, began, first = run_state.seconds, time.monotonic(), run_state.step
    mean = None
    while run_state.step < stop:
        phase = phase_of(size, run_state.step, steps)
        batch = make_batch(encoder, seed, run_state.step, size.rows, size.length, phase)
        value, per_task = run_state.update(batch.arrays())
        parts = np.append(np.asarray(per_task), float(value))
        mean = parts if mean is None else 0.95 * mean + 0.05 * parts
        step = run_state.step
        if step % 25 == 0 or step == stop:
            elapsed = time.monotonic() - began
            rate = (step - first) / elapsed
            tasks = "  ".join(f"{n} {v:.3f}" for n, v in zip(TASK_NAMES, mean, strict=False))
            print(
                f"step {step}/{steps}  loss {mean[-1]:.4f}  {tasks}  "
                f"{rate * size.rows * size.length / 1000:.1f}k tokens/s  "
                f"ETA {(steps - step) / rate / 60:.1f} min",
                flush=True,
            )
        if step % save_every == 0 or step == stop:
            run_state.seconds = before + time.monotonic() - began
            run_state.save(path)
            losses = {n: float(v) for n, v in zip(TASK_NAMES, mean, strict=False)}
            write_model(out, run_state, losses)
    return run_state


def prepare(size: Size, out: Path) -> None:
    """Write config, generation config and tokenizer into `out`."""
    vocabulary.write(out)
    (out / "config.json").write_text(json.dumps(hf_config(size), indent=2) + "\n")
    generation = {
        "do_sample": True,
        "temperature": 0.7,
        "eos_token_id": [
            vocabulary.special_id(vocabulary.STOP),
            vocabulary.special_id(vocabulary.END_OF_TEXT),
        ],
        "pad_token_id": vocabulary.special_id(vocabulary.END_OF_TEXT),
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_model(out: Path, state: State, losses: dict[str, float]) -> None:
    """Weights in bf16 (through the project's own export) and the card."""
    from oel_jax.lm.huggingface import save_model

    scratch = out / "export.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    save_model(scratch, state.cfg, state.params, source=out, dtype=jnp.bfloat16)
    os.replace(scratch / "model.safetensors", out / "model.safetensors")
    shutil.rmtree(scratch)
    card = {
        "run": json.loads(state.identity),
        "step": state.step,
        "seconds": round(state.seconds, 1),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "loss": losses,
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="small", help=f"one of {', '.join(SIZES)}")
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="default: what the size prescribes")
    options = parser.parse_args()
    if options.size not in SIZES:
        raise UserError(f"--size={options.size} does not exist; choose one of {', '.join(SIZES)}")
    size = SIZES[options.size]
    prepare(size, options.out)
    run(size, options.out, options.seed, steps=options.steps or None)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
