"""Peak host memory while a model is loaded onto eight virtual CPU devices.

    python -m benchmarks.load [--model=qwen3_8b] [--layers=4] [--fsdp=8] [--tp=1]

Writes a model of that shape with random bf16 weights into a temporary directory (4 layers of the 8B
shape with its whole vocabulary: 4 GB), loads it in a separate process and reports the most memory
that this process held beyond what it held before, as a multiple of the model's bytes. On virtual
devices the loaded arrays are host memory themselves, so 1.0 is the least there can be.

`anonymous` is what the process really occupies (RssAnon of Linux, sampled); `resident` includes the
pages of the memory-mapped files, which the kernel takes back whenever it needs them.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import side_by_side
from benchmarks.models import SHAPES, hf_config
from benchmarks.side_by_side import Bar, finish
from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.models import safetensors_io
from oel_jax.models.config import ModelConfig
from oel_jax.models.huggingface import load_params
from oel_jax.models.safetensors_io import split_by_size
from oel_jax.models.weight_table import Layout, weights
from oel_jax.parallel.mesh import make_mesh

DEVICES = 8
BAR = 1.3


def write_model(directory: Path, config: dict[str, Any], shard_bytes: int = 2_000_000_000) -> int:
    """Write random bf16 weights, never holding more than one tensor; returns their bytes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    cfg = ModelConfig.from_directory(directory)
    layouts = [(weight, Layout(weight, cfg)) for weight in weights(cfg)]
    shapes = [(name, layout.theirs) for w, layout in layouts for name in layout.names(w)]
    sizes, dtype = dict(shapes), np.dtype(jnp.bfloat16)
    noise = np.random.default_rng(0).normal(0.0, 0.02, 1 << 20).astype(dtype)

    def value(name: str) -> np.ndarray:
        return np.resize(noise, sizes[name])

    placed = {}
    for index, shard in enumerate(split_by_size(shapes, 2, shard_bytes)):
        file = f"model-{index:05d}.safetensors"
        safetensors_io.write(directory / file, shard, dtype, value)
        placed |= {name: file for name, _ in shard}
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return sum(int(np.prod(shape)) * 2 for _, shape in shapes)


def _status() -> dict[str, int]:
    """Memory of this process in bytes: anonymous and resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    kilo = {"anonymous": "RssAnon", "resident": "VmRSS"}
    return {name: int(values[field].split()[0]) * 1024 for name, field in kilo.items()}


class Watch:
    """The most memory that was seen while it was open, above what was held before."""

    def __init__(self, every: float = 0.002):
        self._every, self._stop = every, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.before = self.peak = _status()
        self.samples = 0

    def _look(self) -> None:
        while not self._stop.is_set():
            now = _status()
            self.peak = {name: max(size, now[name]) for name, size in self.peak.items()}
            self.samples += 1
            time.sleep(self._every)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def load_here(directory: Path, fsdp: int, tp: int) -> dict[str, float]:
    """Load in this process; bytes beyond what it held before, and seconds."""
    mesh = make_mesh(fsdp, tp)
    cfg = ModelConfig.from_directory(directory)
    jax.block_until_ready(jnp.zeros(8))  # the devices are up
    began = time.perf_counter()
    with Watch() as watch:
        params = load_params(directory, cfg, mesh=mesh, dtype=jnp.bfloat16)
    taken = {name: watch.peak[name] - watch.before[name] for name in watch.peak}
    held = sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)
    return taken | {
        "before": watch.before["anonymous"],
        "arrays": held,
        "samples": watch.samples,
        "seconds": time.perf_counter() - began,
    }


def load_apart(directory: Path, fsdp: int = DEVICES, tp: int = 1) -> dict[str, float]:
    """`load_here` in a process with `DEVICES` virtual CPU devices."""
    command = [sys.executable, "-m", "benchmarks.load", f"--directory={directory}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [*command, f"--fsdp={fsdp}", f"--tp={tp}"],
        env=environment,
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"loading failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Command line; returns the exit status."""
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", default="qwen3_8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=4, help="layers in place of the model's own")
    parser.add_argument("--fsdp", type=int, default=DEVICES)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument(
        "--directory", type=paths.argument, help="load this model here, and do nothing else"
    )
    options = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise UserError("benchmarks.load reads /proc/self/status, which only Linux has")
    if options.directory:
        print(json.dumps(load_here(options.directory, options.fsdp, options.tp)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        config = hf_config(options.model) | {"num_hidden_layers": options.layers}
        size = write_model(Path(scratch, "model"), config)
        found = load_apart(Path(scratch, "model"), options.fsdp, options.tp)
    rows = [[name, f"{found[name] / 1e9:.2f}"] for name in ("anonymous", "resident", "arrays")]
    rows.insert(0, ["the model's files", f"{size / 1e9:.2f}"])
    settings = {"model": options.model, "layers": options.layers}
    settings |= {"fsdp": options.fsdp, "tp": options.tp}
    bars = [Bar("peak anonymous memory / the model's bytes", found["anonymous"] / size, BAR, True)]
    measured = {"measured": found, "model_bytes": size}
    return finish("load", settings, rows, ["what", "GB"], bars, measured, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
