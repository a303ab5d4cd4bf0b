"""The config of a run that is over in seconds."""

import ml_collections

from oel_jax.config.defaults import default

FIELDS = {
    "rounds": 1,
    "model.dtype": "float32",
    "model.thinking": False,
    "mesh.fsdp": -1,
    "sampler.slots": 8,
    "sampler.prefill_rows": 8,
    "sampler.max_len": 384,
    "sampler.max_prompt": 256,
    "sampler.max_response": 48,
    "deploy.games_per_step": 4,
    "extract.chains": 2,
    "extract.n": 2,
    "extract.n_run": 2,
    "extract.l_max": 48,
    "extract.max_prompt": 512,
    "preflight.games": 0,
    "consolidate.steps": 3,
    "consolidate.save_every": 1,
    "consolidate.token_budget": 1024,
    "loss.top_k": 16,
    "loss.chunk": 128,
    "evaluate.maps": 4,
    "evaluate.seeds": 2,
    "log.tensorboard": False,
    "compilation_cache": "off",
}


def tiny_config(**changes) -> ml_collections.ConfigDict:
    """A round of 12 deployed games, 2 chains of 2 texts, 3 optimizer steps, 2 x 8 evaluated games.

    Args:
      changes: other fields, their dots as two underscores: `extract__n=1`; the first one as one in
        `model_path`, the field that every run needs.
    """
    config = default()
    if "model_path" in changes:
        changes["model__path"] = changes.pop("model_path")
    fields = FIELDS | {name.replace("__", "."): value for name, value in changes.items()}
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    return config
