"""Tools for testing code that uses this package: a script that answers, a dummy model, a tiny run.

    from oel_jax import run, testing

    model = testing.write_dummy_model(tmp_path / "model")
    config = testing.tiny_config(model_path=str(model))
    with testing.scripted(lambda prompt: "[right]", model):
        run(config, tmp_path / "run", ["deploy"])

`scripted` takes the sampler's place: games are real, prompts go through the model's chat template
and all files are written, but no token is computed and nothing is compiled. That is enough for
every stage but consolidation, which needs a model that learns. `ScriptedSampler` is the same for a
function that takes a sampler.
"""

from oel_jax.testing.dummy import write_dummy_model
from oel_jax.testing.scripted import ScriptedSampler, scripted
from oel_jax.testing.tiny import tiny_config

__all__ = ["ScriptedSampler", "scripted", "tiny_config", "write_dummy_model"]
