"""Every loss that a config can ask for: right, with its largest error, or refused and why.

All combinations of `consolidate.mode`, `loss.divergence`, `loss.support` and `loss.correction` go
through the config's own checks and then through the fused loss in float32, and are compared with
NumPy float64 (`distill.reference.exact`) over the inputs of `cases`:

    JAX_PLATFORMS=cpu python -m benchmarks.loss_table        # prints the table, writes results/

An error is the largest difference within a row of logits divided by the largest gradient of that
row, or by 1e-12 where that is more; of the loss, by the loss, or by 0.001 where that is more.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oel_jax.base.errors import UserError
from oel_jax.config.checks import validate
from oel_jax.config.choices import CORRECTIONS, DIVERGENCES, SUPPORTS
from oel_jax.config.defaults import default
from oel_jax.distill.reference import exact
from oel_jax.distill.topk_kl import KLConfig, fused_topk_kl
from oel_jax.learner.settings import loss_settings
from oel_jax.runs.metrics import table as printed

VOCABULARY, TOP_K = 96, 5
MODES = ("on_policy", "off_policy", "sft")
RESULTS = Path(__file__).parent / "results" / "loss_table_cpu.json"


class Errors(NamedTuple):
    """The largest relative errors over the rows of a case."""

    loss: float
    gradient: float


def cases(vocabulary: int = VOCABULARY) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Logits of student and teacher, [rows, V] float32, by name."""
    draw = np.random.default_rng(0)

    def pair(rows: int, scale: float, apart: float) -> tuple[np.ndarray, np.ndarray]:
        z = draw.normal(size=(rows, vocabulary)) * scale
        return z, z + draw.normal(size=z.shape) * apart

    made = {"plain": pair(6, 3, 1), "close": pair(4, 3, 0.01), "huge": pair(4, 1e4, 1e4)}
    made["ties"] = tuple(np.round(side) for side in pair(4, 2, 1))
    # Mass outside of the first five tokens from nearly 1 to 1e-44, of either side.
    gaps = [-5, 0, 5, 10, 15, 20, 30, 40, 50, 60, 68]
    z, z_t = pair(2 * len(gaps), 1, 1)
    z[:, :5] += np.repeat(gaps, 2)[:, None]
    z_t[:, :5] += np.where(np.arange(len(z)) % 2, 8, np.repeat(gaps, 2))[:, None]
    made["outside"] = z, z_t
    z, z_t = pair(12, 1, 1)  # certain of a token, of which the teacher is certain, or another one
    z[:, 0] += 3.0 * np.arange(1, 13)
    z_t[np.arange(12), np.arange(12) % 2] += 15
    made["certain"] = z, z_t
    z, z_t = pair(6, 3, 1)
    z[:4, 7] = z_t[2:, 8] = z[:, 9] = z_t[:, 9] = -np.inf
    made["-inf"] = z, z_t
    return {name: tuple(np.float32(side) for side in both) for name, both in made.items()}


def measure(cfg: KLConfig, dtype: jnp.dtype = jnp.float32) -> dict[str, Errors]:
    """Errors of one loss in each case; the output matrix is the identity, so that hidden states
    are logits."""
    made = cases()
    z, z_t = (np.concatenate([both[i] for both in made.values()]) for i in range(2))
    z, z_t = (np.asarray(jnp.asarray(side, dtype), np.float32) for side in (z, z_t))
    sampled = np.arange(len(z), dtype=np.int32) % 7
    weight = jnp.ones(len(z), jnp.float32)
    how = dict(kind=cfg.divergence, support=cfg.support, correction=cfg.correction)
    values, slopes = exact(z, z_t, sampled, top_k=cfg.top_k, temperature=cfg.temperature, **how)
    ours, gradient = on_logits(cfg, z, z_t, sampled, weight, dtype)
    found, first = {}, 0
    for name, (rows, _) in made.items():
        here = slice(first, first := first + len(rows))
        size = np.maximum(np.abs(values[here]), 1e-3)
        largest = np.maximum(np.abs(slopes[here]).max(1), 1e-12)
        found[name] = Errors(
            float((np.abs(ours[here] - values[here]) / size).max()),
            float((np.abs(gradient[here] - slopes[here]).max(1) / largest).max()),
        )
    return found


def on_logits(
    cfg: KLConfig,
    z: np.ndarray,
    z_t: np.ndarray,
    sampled: np.ndarray,
    weight: np.ndarray,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """Divergence [M] and its gradient by the student's logits [M, V], both float64.

    Hidden states are half the logits and the output matrix is twice the identity: both exact, and
    minus infinity is what -3e38 overflows to.
    """

    def halved(side: np.ndarray) -> jax.Array:
        return jnp.asarray(np.maximum(side / 2, -3e38), dtype)

    twice = 2 * jnp.eye(z.shape[1], dtype=dtype)

    def loss(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, stats = fused_topk_kl(cfg, hidden, twice, halved(z_t), twice, sampled, weight)
        return total, stats.kl

    gradient, values = jax.jit(jax.grad(loss, has_aux=True))(halved(z))
    return np.asarray(values, np.float64), np.asarray(gradient, np.float64) / 2


def table() -> list[dict]:
    """A record of each combination: its fields, and `refused` or `errors` by case."""
    done: dict[KLConfig, Mapping[str, Errors]] = {}
    found = []
    kinds = [kind for kind in DIVERGENCES if kind != "nll"]  # 'nll' is what 'sft' means
    combinations = [(None, None, "none"), *itertools.product(kinds, SUPPORTS, CORRECTIONS)]
    for mode, how in itertools.product(MODES, combinations):
        config = default()
        config.consolidate.mode = mode
        config.loss.divergence, config.loss.support, config.loss.correction = how
        config.loss.top_k = TOP_K
        record = {"mode": mode, "divergence": how[0], "support": how[1], "correction": how[2]}
        try:
            validate(config)
        except UserError as error:
            found.append(record | {"refused": str(error)})
            continue
        cfg = loss_settings(config)
        if cfg not in done:
            done[cfg] = measure(cfg)
        record |= {"trained": [cfg.divergence, cfg.support, cfg.correction]}
        found.append(record | {"errors": {name: one._asdict() for name, one in done[cfg].items()}})
    return found


def worst(record: dict, part: str) -> float:
    """The largest error of a record over all cases."""
    return max(one[part] for one in record["errors"].values())


def main() -> None:
    """Print the table and write it."""
    records = table()
    rows = []
    for record in records:
        fields = [
            record[name] or "None" for name in ("mode", "divergence", "support", "correction")
        ]
        if "refused" in record:
            rows.append([*fields, "refused", "-", "-"])
        else:
            errors = [f"{worst(record, part):.1e}" for part in Errors._fields]
            rows.append([*fields, " ".join(record["trained"]), *errors])
    headers = ["mode", "divergence", "support", "correction", "is trained", "loss", "gradient"]
    print(printed(rows, headers))
    right = [record for record in records if "errors" in record]
    print(
        f"{len(right)} of {len(records)} combinations are trained, the others are refused; largest "
        + ", ".join(
            f"error of the {p} {max(worst(r, p) for r in right):.1e}" for p in Errors._fields
        )
    )
    RESULTS.write_text(json.dumps({"jax": jax.__version__, "table": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
