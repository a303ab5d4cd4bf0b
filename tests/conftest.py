"""Shared data of the tests: the real Qwen3 tokenizer and tiny random Hugging Face models."""

import fcntl
import gc
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # after JAX_PLATFORMS is set
import jax.numpy as jnp
import numpy as np
import pytest

# Virtual devices for the tests of meshes; unlike XLA_FLAGS this does not leak into subprocesses.
jax.config.update("jax_num_cpu_devices", 8)

# Compiled programs are kept between runs of the tests, and shared with the processes they start.
if "OEL_TEST_XLA_CACHE" not in os.environ:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ["OEL_TEST_XLA_CACHE"] = str(caches / "oel_jax" / f"tests-jax-{jax.__version__}")
jax.config.update("jax_compilation_cache_dir", os.environ["OEL_TEST_XLA_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# A shell lets commands in the background ignore Ctrl-C, and their children; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tiers"]

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Before anything is compiled: a full cache holds about two thousand files."""
    import tiers  # pytest_plugins has imported it by now, with its asserts rewritten

    kept = Path(os.environ["OEL_TEST_XLA_CACHE"])
    tiers.judged = kept.is_dir() and sum(1 for _ in kept.iterdir()) > 1000


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps() -> Iterator[None]:
    """Drop compiled programs before the process has more memory maps than Linux allows.

    XLA maps several pieces of memory for each program on a CPU. All tests in one process reach the
    kernel's limit of 65,530, where XLA aborts; the largest file makes 18,000 of them.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def qwen3_tokenizer_dir() -> Path:
    """A directory with the Qwen3 tokenizer files, or skip: 11 MB are not part of the clone."""
    places = [REPOSITORY.parent / "shared" / "models" / "qwen3-tokenizer"]
    if "OEL_QWEN3_TOKENIZER" in os.environ:
        places.insert(0, Path(os.environ["OEL_QWEN3_TOKENIZER"]))
    from huggingface_hub.constants import HF_HUB_CACHE

    places += sorted(Path(HF_HUB_CACHE).glob("models--Qwen--Qwen3-*/snapshots/*"))
    for place in places:
        files = [place / "tokenizer.json", place / "tokenizer_config.json"]
        # Other Qwen3 families (2507, Embedding, VL) share the name, not the chat template.
        if all(f.is_file() for f in files) and "enable_thinking" in files[1].read_text("utf-8"):
            return place
    pytest.skip(
        "the Qwen3 tokenizer is neither in $OEL_QWEN3_TOKENIZER, nor in ../shared/models, nor in "
        "the Hugging Face cache"
    )


def write_model(
    directory: Path,
    family: str,
    *,
    tied: bool = False,
    dtype: str = "float32",
    shards: int = 1,
    **fields,
) -> Path:
    """Writes a tiny random model, family 'qwen3', 'qwen2' or 'llama', in transformers' layout.

    The config is written by transformers and the tensors by safetensors, but PyTorch is not needed.
    All parameters are random, the norms and biases too (their usual ones and zeros would hide a
    swapped or forgotten one). head_dim is not hidden_size / heads.
    """
    import transformers
    from safetensors.numpy import save_file

    config_class, architecture = {
        "qwen3": (transformers.Qwen3Config, "Qwen3ForCausalLM"),
        "qwen2": (transformers.Qwen2Config, "Qwen2ForCausalLM"),
        "llama": (transformers.LlamaConfig, "LlamaForCausalLM"),
    }[family]
    width, mlp, heads, kv_heads, head_dim, vocab, layers = 64, 96, 4, 2, 24, 304, 2
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config_class(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        architectures=[architecture],
        dtype=dtype,
        **ends,
        **fields,
    ).save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(ends))

    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        outputs = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        for name, size in outputs.items():
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (size, width)
            if family == "qwen2":
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
            if family == "qwen3" and name != "v":
                shapes[f"{prefix}self_attn.{name}_norm.weight"] = (head_dim,)
        shapes[prefix + "self_attn.o_proj.weight"] = (width, heads * head_dim)
        shapes[prefix + "mlp.gate_proj.weight"] = shapes[prefix + "mlp.up_proj.weight"] = (
            mlp,
            width,
        )
        shapes[prefix + "mlp.down_proj.weight"] = (width, mlp)
        shapes[prefix + "input_layernorm.weight"] = (width,)
        shapes[prefix + "post_attention_layernorm.weight"] = (width,)
    draw = np.random.default_rng(0)
    values = {
        name: (draw.normal(1.0, 0.2, shape) if "norm" in name else draw.normal(0.0, 0.1, shape))
        for name, shape in shapes.items()
    }
    values = {name: value.astype(jnp.dtype(dtype)) for name, value in values.items()}
    if shards == 1:
        save_file(values, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    placed = {name: files[i % shards] for i, name in enumerate(values)}
    for file in files:
        part = {name: value for name, value in values.items() if placed[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of random models: qwen3_tied, qwen3_untied, qwen2, llama3 (rope scaling)."""
    root = tmp_path_factory.mktemp("models")
    # Original length 64: within a few hundred positions all three ranges of the scaling matter.
    llama3 = dict(
        rope_type="llama3",
        rope_theta=10_000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    rope = dict(rope_type="default", rope_theta=1_000_000.0)
    return {
        "qwen3_tied": write_model(root / "qwen3_tied", "qwen3", tied=True, rope_parameters=rope),
        "qwen3_untied": write_model(root / "qwen3_untied", "qwen3", rope_parameters=rope),
        "qwen2": write_model(root / "qwen2", "qwen2", rope_parameters=rope),
        "llama3": write_model(root / "llama3", "llama", rope_parameters=llama3),
    }


def make_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]
) -> Path:
    """A directory that all workers of pytest-xdist share; the first that needs it makes it.

    Args:
      name: of the directory.
      make: fills the directory, which is not there yet.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of the session; each worker has a directory in it
    place, made = root / "shared" / name, root / "shared" / f"{name}.made"
    place.parent.mkdir(exist_ok=True)
    with open(root / "shared" / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(place, ignore_errors=True)  # of a worker that failed
            make(place)
            made.touch()
    return place


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workdir of a one-round run with the nano model, never interrupted; copy it, do not change it.

    Made with `tiny_run.tiny_config()`.
    """
    import tiny_run

    def make(workdir: Path) -> None:
        tiny_run.go(workdir, tiny_run.tiny_config())

    return make_once(tmp_path_factory, "finished", make)


@pytest.fixture(scope="session")
def run_of_command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run made by the command, in a process that has one device and not eight.

    XLA on a CPU shares work out by the number of devices, and sums then differ in the last bit.
    """
    import subprocess
    import sys

    import tiny_run

    def make(workdir: Path) -> None:
        flags = [*tiny_run.as_flags(), f"--workdir={workdir}"]
        command = [sys.executable, "-m", "oel_jax.main", *flags]
        done = subprocess.run(command, cwd=tiny_run.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return make_once(tmp_path_factory, "by_command", make)
