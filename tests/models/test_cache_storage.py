"""How caches are stored: values come back to the bit, and no program changes a cache as a whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_caches import PROGRAMS, Found, changes, look, model
from jax.sharding import AbstractMesh

from oel_jax.models import cache_storage, shared_prefix
from oel_jax.models.cache_storage import (
    as_heads,
    as_stored_in,
    from_stored,
    read_block,
    stored_dtype,
    stored_shape,
    to_stored,
)
from oel_jax.models.decoder import init_params, param_shardings
from oel_jax.parallel.mesh import make_mesh
from oel_jax.sampler import slots
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.sampler.sampler import Sampler

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = ROOT / ".venv" / "compilers"  # tests/run.sh puts them there, where no run finds them


def bits_of(values) -> np.ndarray:
    return np.asarray(values).view(f"uint{8 * values.dtype.itemsize}")


def test_what_is_stored_as_bits():
    assert stored_dtype(jnp.bfloat16, "cpu") == jnp.uint16
    assert stored_dtype(jnp.float32, "tpu") == jnp.uint32
    for dtype, platform in (("float32", "cpu"), ("bfloat16", "tpu"), ("bfloat16", "gpu")):
        assert stored_dtype(jnp.dtype(dtype), platform) == jnp.dtype(dtype)


def test_values_come_back_to_the_bit():
    """All 65,536 numbers of bfloat16: infinities, NaNs and denormals among them."""
    patterns = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    values = jnp.asarray(patterns.reshape(2, 8, 32, 128))
    stored = to_stored(values)
    assert stored.dtype == stored_dtype(jnp.bfloat16, "cpu")
    np.testing.assert_array_equal(bits_of(from_stored(stored)), bits_of(values))


@pytest.mark.parametrize(
    "kv_heads, head_dim, tp, expected",
    [
        (8, 128, 1, (8, 128)),
        (8, 64, 1, (512,)),
        (3, 64, 1, (256,)),
        (2, 64, 2, (256,)),
        (4, 80, 2, (512,)),
    ],
)
def test_heads_fill_tiles_of_a_tpu(kv_heads, head_dim, tp, expected, monkeypatch):
    shape = AbstractMesh((1, tp), ("fsdp", "tp"))
    assert stored_shape(kv_heads, head_dim, shape) == (kv_heads, head_dim)  # a plan by hand
    assert stored_shape(kv_heads, head_dim, make_mesh(1, 1, jax.devices()[:1])) == (
        kv_heads,
        head_dim,
    )
    monkeypatch.setattr(cache_storage, "platform_of", lambda mesh: "tpu")
    assert stored_shape(kv_heads, head_dim, shape) == expected


def test_a_padded_store_gives_the_heads_back():
    heads = (3, 64)
    store = jnp.zeros((2, 4, 32, 256), jnp.float32)
    new = jax.random.normal(jax.random.key(0), (2, 4, 32, *heads))
    store = store.at[:].set(as_stored_in(store, new))
    np.testing.assert_array_equal(as_heads(store, 3, heads), new)
    found = read_block(store, (1, 0, 8), (1, 4, 16), heads)
    np.testing.assert_array_equal(found[0], new[1, :, 8:24])


def answers(dtype: str) -> list[tuple[list[int], np.ndarray]]:
    """Greedy answers of a small model whose caches have 3 heads of 64."""
    cfg, mesh = model("smollm2"), make_mesh(1, 1, jax.devices()[:1])
    params = init_params(cfg, jax.random.key(1), jnp.dtype(dtype))
    params = jax.device_put(params, param_shardings(cfg, mesh))
    sampler = Sampler(
        cfg,
        mesh,
        SamplerConfig(
            slots=4,
            length=128,
            response=12,
            dtype=jnp.dtype(dtype),
            longest_prefix=64,
            prefill_rows=4,
            prefill_chunk=16,
        ),
        sampling=Sampling(1.0, top_k=1),
        limit=cfg.vocab_size,
        stop_ids=(),
    )
    draw = np.random.default_rng(0)
    text = tuple(draw.integers(0, 512, 64).tolist())
    prompts = [[*text, *draw.integers(0, 512, 5 + 9 * i).tolist()] for i in range(3)]
    prompts.append(prompts[0])  # is copied from its twin's slot
    requests = [Request(p, request_key(i), 12, prefix=text) for i, p in enumerate(prompts)]
    return [(done.ids, np.asarray(done.log_probs)) for done in sampler.generate(params, requests)]


def same_answers(first: list, second: list) -> None:
    for (ids, log_probs), (other_ids, other_log_probs) in zip(first, second, strict=True):
        assert ids == other_ids
        np.testing.assert_array_equal(log_probs, other_log_probs)


@pytest.mark.slow
def test_a_merged_and_padded_cache_gives_the_same_answers(monkeypatch):
    """What a TPU stores for heads of 64, run here."""
    plain = answers("float32")
    jax.clear_caches()
    monkeypatch.setattr(slots, "stored_shape", lambda *_: (256,))
    same_answers(plain, answers("float32"))


@pytest.mark.slow
def test_bits_give_the_same_answers_as_numbers(monkeypatch):
    bits = answers("bfloat16")
    jax.clear_caches()  # programs are found by their functions, which do not change
    for module, name in ((slots, "stored_dtype"), (shared_prefix, "to_stored")):
        monkeypatch.setattr(module, name, lambda dtype, *_: dtype)
    same_answers(bits, answers("bfloat16"))
    jax.clear_caches()


def test_the_search_for_changes_finds_them():
    shape, bank = (5, 4, 256, 2, 16), (5, 1, 64, 2, 16)
    cache = jax.ShapeDtypeStruct(shape, jnp.float32)

    def all_of(function):
        return changes(
            jax.jit(function).lower(cache).compile().as_text(), [shape, bank], {"fusion"}
        )

    assert any(each.startswith("convert") for each in all_of(lambda x: x.astype(jnp.bfloat16)))
    assert any("transpose" in each or "copy" in each for each in all_of(lambda x: x.swapaxes(1, 2)))


def check(found: list[Found]) -> None:
    names = {one.program for one in found}
    assert {"copy slots", "put a text", "admit", PROGRAMS[0], PROGRAMS[1]} <= names
    for one in found:
        assert not one.changes, one
        if not one.program.startswith("read a text"):  # which holds activations of the whole text
            assert one.temporary < one.cache / 8, one


@pytest.mark.aot
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=str)
def test_no_program_changes_a_whole_cache_on_a_cpu(dtype, shape):
    mesh = make_mesh(*shape, jax.devices()[: shape[0] * shape[1]])
    check(look(mesh, dtype, "qwen3", PROGRAMS[:3]))


@pytest.mark.aot
@pytest.mark.parametrize("target", ["h200:1", "v5e:2x2"])
def test_no_program_changes_a_whole_cache_elsewhere(target):
    if not COMPILERS.is_dir():
        pytest.skip("tests/run.sh installs the compilers of GPUs and TPUs in .venv/compilers")
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{COMPILERS}", "JAX_PLATFORMS": "cpu"}
    env["TF_CPP_MIN_LOG_LEVEL"] = "3"
    command = [sys.executable, ROOT / "tests" / "compiled_caches.py", target]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len({(dtype, heads) for dtype, heads, *_ in rows}) == 4
    check([Found(*row[2:5], tuple(row[5])) for row in rows])
