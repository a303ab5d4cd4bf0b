"""A profile can be read: programs name what their operations belong to."""

import jax
import jax.numpy as jnp
import numpy as np

from oel_jax.distill.optimizer import adamw
from oel_jax.distill.step import update
from oel_jax.distill.topk_kl import KLConfig, fused_topk_kl
from oel_jax.models.language_model import load_model
from oel_jax.parallel.mesh import put_batch
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.decode import decode
from oel_jax.sampler.prefill import Piece, extend
from oel_jax.sampler.slots import empty_state


def names(lowered):
    return lowered.as_text(debug_info=True)


def test_sampler_programs_name_their_parts(tiny_models):
    model = load_model(tiny_models["qwen3_tied"])
    with jax.set_mesh(model.mesh):
        state = empty_state(model.cfg, model.mesh, SamplerConfig(slots=2, length=64, response=8))
        text = names(
            decode.lower(model.cfg, model.params, state, np.int32(1), limit=290, widths=(0,))
        )
        for scope in ("decode/", "block/attention/", "block/mlp/", "sample/"):
            assert scope in text, scope
        row = np.zeros(2, np.int32)
        rows = put_batch(model.mesh, (np.zeros((2, 16), np.int32), row, row, row, row))
        piece = Piece(*rows, np.int32(0))
        text = names(extend.lower(model.cfg, model.params, state, piece))
        assert "prefill/" in text and "block/attention/" in text


def test_training_programs_name_their_parts():
    z, weight = jnp.ones((4, 8)), jnp.ones(4)
    ids, matrix = jnp.zeros(4, jnp.int32), jnp.ones((16, 8))
    loss = jax.jit(lambda h: fused_topk_kl(KLConfig(4, 1.0), h, matrix, z, matrix, ids, weight)[0])
    assert "loss/" in names(loss.lower(z))
    tx, params = adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, decay=0.0), {"w": z}
    step = update.lower(params, tx.init(params), params, tx=tx, clip_norm=1.0)
    assert "optimizer/" in names(step)
