"""Pre-train a nano model from scratch on procedurally generated worlds.

    python -m oel_jax.nano.pretrain --size=small --out=DIR --seed=0

Writes a Hugging Face directory (bf16) with tokenizer and `card.json` (seed, steps, time, loss per
task). The run keeps a checkpoint in DIR/state.npz; the same command resumes from there and ends in
the same weights as an uninterrupted run. Muon trains the matrices, Adam everything else.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import Params, forward, init_params, unembed
from oel_jax.nano import vocabulary
from oel_jax.nano.packing import TASK_NAMES, Batch, make_batch
from oel_jax.parallel.mesh import all_devices

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
    """A member of the family and how long it is trained; `packs` are (rows, tokens) of a step."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    steps: int
    packs: tuple[tuple[int, int], ...] = ((4, 512), (8, 256))
    rate: float = 0.02
    adam_rate: float = 3e-3

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return sum(rows * length for rows, length in self.packs)


# The mixture `EARLY_TASKS` is used until look-up has emerged: until the running loss of the
# glossary task falls below EMERGED, at most for half of the steps.
EMERGED = 0.12

SIZES = {
    "tiny": Size(hidden=96, layers=4, heads=3, kv_heads=1, mlp=288, steps=4200),
    "small": Size(hidden=128, layers=4, heads=4, kv_heads=2, mlp=384, steps=4200),
    "medium": Size(hidden=192, layers=4, heads=6, kv_heads=2, mlp=576, steps=4200),
}


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
    """Muon on the layers' matrices and Adam on the rest: warm-up, half the way level, then down to
    zero."""

    def schedule(peak: float) -> optax.Schedule:
        warm, hold = max(1, min(60, steps // 10)), steps // 2
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, warm),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0.0, max(1, steps - hold)),
            ],
            [warm, hold],
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


Arrays = tuple[tuple[jax.Array | np.ndarray, ...], ...]


def loss(params: Params, batch: Arrays, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Weighted mean cross-entropy, and the mean over reply targets of each task [tasks] (NaN for a
    task that is not in the batch)."""
    total = jnp.zeros(2)
    per_task = jnp.zeros((2, len(TASK_NAMES)))
    for tokens, targets, positions, segments, weights, tasks in batch:
        # Recomputing layers is faster than keeping their activations, on a CPU too.
        hidden = forward(cfg, params, tokens, positions, segments, remat="layer")
        logits = unembed(cfg, params, hidden)
        # First, so that the loss of a likely token is a difference of small numbers.
        logits -= jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        each = jax.nn.logsumexp(logits, axis=-1) - picked
        mine = jax.nn.one_hot(tasks, len(TASK_NAMES))
        total += jnp.stack([(each * weights).sum(), weights.sum()])
        per_task += jnp.stack([(each[..., None] * mine).sum((0, 1)), mine.sum((0, 1))])
    return total[0] / total[1], per_task[0] / per_task[1]


@partial(jax.jit, static_argnames=("cfg", "optimizer"), donate_argnums=(0, 1))
def train_step(params, state, batch, cfg: ModelConfig, optimizer: optax.GradientTransformation):
    """One update; returns params, optimizer state, loss and loss per task."""
    (value, per_task), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, cfg)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value, per_task


class State:
    """Parameters and optimizer state, with their file."""

    def __init__(self, size: Size, steps: int, seed: int):
        self.size = size
        self.cfg = ModelConfig.from_hf(hf_config(size))
        self.optimizer = make_optimizer(size, steps)
        self.identity = json.dumps({**dataclasses.asdict(size), "steps": steps, "seed": seed})
        self.params = jax.jit(lambda key: init_params(self.cfg, key))(jax.random.key(seed))
        self.state = jax.jit(self.optimizer.init)(self.params)
        self.step = 0
        self.seconds = 0.0
        self.mean = np.full(len(TASK_NAMES) + 1, np.nan)  # running mean of the losses
        self.main_from = steps // 2  # first step with the main mixture

    def update(self, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        """One step; returns loss and loss per task."""
        self.params, self.state, value, per_task = train_step(
            self.params, self.state, batch, self.cfg, self.optimizer
        )
        self.step += 1
        return value, per_task

    def note(self, losses: np.ndarray) -> None:
        """Take the losses of a step (per task, NaN where there are none; all) into the mean."""
        losses = np.where(np.isnan(losses), self.mean, losses)
        self.mean = np.where(np.isnan(self.mean), losses, 0.95 * self.mean + 0.05 * losses)
        if self.mean[TASK_NAMES.index("glossary")] < EMERGED:
            # The batch of the next step is already drawn.
            self.main_from = min(self.main_from, self.step + 1)

    def phase(self, step: int) -> str:
        """Which mixture of examples a step (counted from 0) uses, as far as is known."""
        return "early" if step < self.main_from else "main"

    def save(self, path: Path) -> None:
        """Write everything, atomically."""
        leaves = jax.tree.leaves((self.params, self.state))
        scratch = path.with_suffix(".partial.npz")
        np.savez(
            scratch,
            identity=self.identity,
            step=self.step,
            seconds=self.seconds,
            mean=self.mean,
            main_from=self.main_from,
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
            self.mean, self.main_from = data["mean"], int(data["main_from"])


def run(
    size: Size,
    out: Path,
    seed: int,
    *,
    steps: int | None = None,
    stop: int | None = None,
    save_every: int = 250,
) -> State:
    """Train, or resume training, into `out`; returns the last state. Prints progress.

    `steps` is the length the rates are planned for; `stop` ends this call earlier, with a
    checkpoint from which the next call resumes.
    """
    steps = steps or size.steps
    stop = min(stop or steps, steps)
    encoder = vocabulary.Encoder(out)
    run_state = State(size, steps, seed)
    path = out / "state.npz"
    if path.exists():
        run_state.restore(path)
        print(f"resuming from step {run_state.step}", flush=True)
    before, began, first = run_state.seconds, time.monotonic(), run_state.step
    made = made_with()

    def draw(step: int) -> tuple[Batch, ...]:
        return make_batch(encoder, seed, step, size.packs, run_state.phase(step))

    with ThreadPoolExecutor(1) as drawing:  # the next batch is drawn while this one is computed
        coming = drawing.submit(draw, run_state.step)
        while run_state.step < stop:
            batch = coming.result()
            coming = drawing.submit(draw, run_state.step + 1)
            value, per_task = run_state.update(tuple(pack.arrays() for pack in batch))
            run_state.note(np.append(np.asarray(per_task), float(value)))
            step = run_state.step
            if step % 25 == 0 or step == stop:
                rate = (step - first) / (time.monotonic() - began)
                print(_progress(size, step, steps, rate, run_state.mean), flush=True)
            if step % save_every == 0 or step == stop:
                run_state.seconds = before + time.monotonic() - began
                run_state.save(path)
                write_model(out, run_state, made)
    return run_state


def _progress(size: Size, step: int, steps: int, rate: float, mean: np.ndarray) -> str:
    """One line: loss, loss per task, speed and time left."""
    tasks = "  ".join(f"{n} {v:.3f}" for n, v in zip(TASK_NAMES, mean, strict=False))
    for game, short in (("frozen_lake", "lake"), ("sokoban", "room")):
        tasks = tasks.replace(game, short)
    speed = rate * size.tokens / 1000
    left = (steps - step) / rate / 60
    return (
        f"step {step}/{steps}  loss {mean[-1]:.4f}  {tasks}  {speed:.1f}k tokens/s  "
        f"ETA {left:.1f} min"
    )


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


def made_with() -> dict[str, object]:
    """Commit of this code (with a mark if it was changed since), library, and machine."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    changed = git("status", "--porcelain", "--", str(here)) not in ("", "unknown")
    return {
        "commit": git("rev-parse", "HEAD") + (" with changes" if changed else ""),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    }


def write_model(out: Path, state: State, made: dict[str, object]) -> None:
    """Weights in bf16 (through the project's own export) and the card."""
    from oel_jax.models.huggingface import save_model

    scratch = out / "export.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    save_model(scratch, state.cfg, state.params, source=out, dtype=jnp.bfloat16)
    os.replace(scratch / "model.safetensors", out / "model.safetensors")
    shutil.rmtree(scratch)
    card = {
        "run": json.loads(state.identity),
        "step": state.step,
        "seconds": round(state.seconds, 1),
        "tokens": state.step * state.size.tokens,
        "main_from": state.main_from,
        "made_with": made,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "loss": {
            name: round(float(value), 4)
            for name, value in zip(TASK_NAMES, state.mean, strict=False)
        },
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def use_cores(count: int) -> None:
    """Keep this process to `count` CPU cores; call before JAX computes anything.

    XLA splits sums by the number of cores, so only a fixed number gives the same bits everywhere.
    """
    if count and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="small", help=f"one of {', '.join(SIZES)}")
    parser.add_argument(
        "--out", type=paths.argument, required=True, help="directory to write the model to"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="default: what the size prescribes")
    parser.add_argument(
        "--cores", type=int, default=1, help="CPU cores to use; other numbers give other last bits"
    )
    options = parser.parse_args()
    if options.steps < 0 or options.cores < 0:
        raise UserError("--steps and --cores must not be negative (0: the size's, all)")
    use_cores(options.cores)
    if options.size not in SIZES:
        raise UserError(f"--size={options.size} does not exist; choose one of {', '.join(SIZES)}")
    size = SIZES[options.size]
    all_devices()
    try:
        prepare(size, options.out)
    except OSError as error:
        raise UserError(f"--out={options.out} cannot be written: {error.strerror}") from error
    run(size, options.out, options.seed, steps=options.steps or None)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
