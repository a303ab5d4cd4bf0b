"""The decoder against transformers, and every clever path against the plain one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import meshes

from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import (
    CachedPrefix,
    KeyValues,
    abstract_params,
    forward,
    init_params,
    param_shardings,
    unembed,
)
from oel_jax.models.language_model import load_model
from oel_jax.parallel.mesh import make_mesh, put_batch

ROWS, LENGTH = 4, 48
LENGTHS = (48, 31, 7, 1)


@partial(jax.jit, static_argnames=("cfg", "remat", "block"))
def logits_of(cfg, params, tokens, positions, segments, prefix=None, *, remat="none", block=256):
    hidden = forward(
        cfg, params, tokens, positions, segments, prefix=prefix, remat=remat, block=block
    )
    return unembed(cfg, params, hidden)


def plain_batch(tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones_like(tokens)


@pytest.fixture(scope="module")
def small(tiny_models):
    """(config, params, random tokens) of the tied Qwen3; its weights are far from initial."""
    model = load_model(tiny_models["qwen3_tied"])
    params = jax.device_get(model.params)  # plain arrays: these tests choose their own mesh
    tokens = np.random.default_rng(1).integers(3, 300, (ROWS, LENGTH)).astype(np.int32)
    return model.cfg, params, tokens


@pytest.mark.parametrize("family", ["qwen3_tied", "qwen3_untied", "qwen2", "llama3"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_equal_transformers(tiny_models, family, side):
    torch = pytest.importorskip("torch", reason="compares with transformers' PyTorch models")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_models[family], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = np.random.default_rng(0).integers(3, 300, (ROWS, LENGTH)).astype(np.int32)
    mask = np.zeros_like(tokens)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(0, length) if side == "right" else slice(LENGTH - length, None)] = 1
    positions = np.maximum(mask.cumsum(1) - 1, 0).astype(np.int32)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions, dtype=torch.long),
        ).logits.numpy()
    model = load_model(tiny_models[family])
    with jax.set_mesh(model.mesh):
        batch = put_batch(model.mesh, (tokens, positions, mask))
        ours = np.asarray(logits_of(model.cfg, model.params, *batch))
    difference = np.abs(ours - expected)[mask == 1].max()
    assert difference <= 1e-4, difference
    assert np.abs(expected[mask == 1]).max() > 1.0  # a comparison of zeros would prove nothing


def test_language_model_logits_pads_rows(tiny_models):
    model = load_model(tiny_models["qwen3_untied"])
    both = model.logits([[5, 6, 7, 8], [9, 10]])
    assert both.shape == (2, 4, model.cfg.vocab_size) and both.dtype == jnp.float32
    alone = model.logits([[9, 10]])
    np.testing.assert_allclose(both[1, :2], alone[0], atol=1e-5)
    for bad in ([], [[]], [[-1]], [[model.cfg.vocab_size]]):
        with pytest.raises(ValueError, match="token ids"):
            model.logits(bad)


def test_packed_rows_equal_separate_rows(small):
    cfg, params, tokens = small
    whole = logits_of(cfg, params, *plain_batch(tokens))
    positions = np.concatenate([np.arange(20), np.arange(18), np.arange(10)]).astype(np.int32)
    segments = np.repeat([1, 2, 3], [20, 18, 10]).astype(np.int32)
    packed_tokens = np.concatenate([tokens[0, :20], tokens[1, :18], tokens[2, :10]])
    packed = logits_of(cfg, params, packed_tokens[None], positions[None], segments[None])[0]
    for row, (start, length) in enumerate([(0, 20), (20, 18), (38, 10)]):
        np.testing.assert_allclose(
            packed[start : start + length], whole[row, :length], atol=1e-5, rtol=0
        )


def test_shared_prefix_equals_concatenation(small):
    """Rows that see different lengths of one cached prefix, against the whole sequences."""
    cfg, params, tokens = small
    lengths = np.array([16, 16, 9, 0])
    common = tokens[:1, :16]
    run = jax.jit(lambda *batch: forward(cfg, params, *batch, keep=lambda side: side)[1])
    cache = run(*plain_batch(common))
    cache = KeyValues(cache.keys[:, 0], cache.values[:, 0])
    suffix = tokens[:, 16:40]
    positions = (lengths[:, None] + np.arange(24)).astype(np.int32)
    seen = np.broadcast_to(lengths[:, None], suffix.shape).astype(np.int32)
    ours = logits_of(
        cfg, params, suffix, positions, np.ones_like(suffix), CachedPrefix(cache, seen)
    )
    for row, length in enumerate(lengths):
        sequence = np.concatenate([common[0, :length], suffix[row]])[None]
        expected = logits_of(cfg, params, *plain_batch(sequence))[0, length:]
        np.testing.assert_allclose(ours[row], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("block", [16, 20])  # divides the length; does not
def test_query_blocks_change_nothing(small, block):
    cfg, params, tokens = small
    batch = plain_batch(tokens)
    whole = logits_of(cfg, params, *batch)
    np.testing.assert_allclose(logits_of(cfg, params, *batch, block=block), whole, atol=1e-5)


@pytest.mark.parametrize("shape", meshes((2, 2), (4, 2), (8, 1)))
def test_mesh_equals_one_device(small, shape):
    """Values and gradients on virtual devices; parameters stay split."""
    cfg, params, tokens = small
    batch = plain_batch(np.concatenate([tokens, tokens[::-1]]))

    def loss(params, *batch):
        return jnp.mean(logits_of(cfg, params, *batch, remat="layer") ** 2)

    expected, gradient = jax.jit(jax.value_and_grad(loss))(params, *batch)
    mesh = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    with jax.set_mesh(mesh):
        split = jax.device_put(params, param_shardings(cfg, mesh))
        value, on_mesh = jax.jit(jax.value_and_grad(loss))(split, *put_batch(mesh, batch))
    assert abs(value - expected) <= 1e-5 * abs(expected)
    for ours, theirs in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(gradient), strict=True):
        scale = np.abs(theirs).max()
        assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * scale
    gate = on_mesh["layers"]["gate"]
    assert gate.addressable_shards[0].data.size == gate.size // (shape[0] * shape[1])


def test_rows_do_not_see_each_other(small):
    cfg, params, tokens = small
    changed = tokens.copy()
    changed[1] = 5
    before = logits_of(cfg, params, *plain_batch(tokens))
    after = logits_of(cfg, params, *plain_batch(changed))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 0.1


def test_init_and_abstract_trees_agree(small):
    cfg = small[0]
    fresh = init_params(cfg, jax.random.key(0), jnp.bfloat16)
    abstract = abstract_params(cfg, jnp.bfloat16)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), fresh) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract
    )


def test_make_mesh_names_the_field():
    with pytest.raises(ValueError, match=r"config\.mesh.*fsdp=3"):
        make_mesh(3, 2)
    assert make_mesh(-1, 2).shape == {"fsdp": 4, "tp": 2}


def test_config_is_what_the_directory_says(tiny_models):
    cfg = ModelConfig.from_directory(tiny_models["qwen2"])
    assert cfg.attention_bias and not cfg.qk_norm and cfg.head_dim == 24
