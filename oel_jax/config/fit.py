"""Does a config fit a model and the devices? Asked before weights are read."""

from typing import Any

import ml_collections

from oel_jax.base.errors import UserError
from oel_jax.config.budgets import extractor_budget, has_extractor, play_budget
from oel_jax.config.chat_checks import is_chat
from oel_jax.config.fields import refuse


def _mesh_shape(config: ml_collections.ConfigDict, device_count: int) -> tuple[int, int]:
    """(fsdp, tp) with -1 resolved.

    Raises:
      UserError: the product is not the number of devices.
    """
    fsdp, tp = config.mesh.fsdp, config.mesh.tp
    if fsdp == -1 and device_count % tp == 0:
        fsdp = device_count // tp
    if fsdp * tp != device_count:
        raise UserError(
            f"config.mesh.fsdp={config.mesh.fsdp} x config.mesh.tp={tp} does not give the "
            f"{device_count} device(s) that JAX sees; set config.mesh.fsdp=-1 and config.mesh.tp "
            f"to one of {_divisors(device_count)}"
        )
    return fsdp, tp


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def validate_against_model(
    config: ml_collections.ConfigDict,
    model_config: Any,
    tokenizer_vocab_size: int,
    device_count: int,
    process_count: int = 1,
) -> None:
    """Check the config against the model's shape and the devices; call it before loading weights.

    Args:
      config: a config that passed `validate`.
      model_config: `oel_jax.models.config.ModelConfig`.
      tokenizer_vocab_size: ids from this one on are padding rows and never sampled.
      device_count: devices that JAX sees, in all processes.
      process_count: processes; each has its own samplers on its own devices.

    Raises:
      UserError: names the field and the values that would fit.
    """
    m = model_config
    fsdp, tp = _mesh_shape(config, device_count)
    if config.loss.top_k > m.vocab_size:
        refuse("loss.top_k", config.loss.top_k, f"at most the model's vocabulary, {m.vocab_size}")
    for group in ("deploy", "extract", "evaluate"):
        if config[group].top_k > tokenizer_vocab_size:
            refuse(
                f"{group}.top_k",
                config[group].top_k,
                f"at most {tokenizer_vocab_size}, the tokens of the tokenizer (0 = off)",
            )
    each = f" x {process_count} processes" if process_count > 1 else ""
    smallest = min(m.hidden_size, m.num_kv_heads * m.head_dim, m.intermediate_size)
    if config.lora.rank > smallest:
        refuse("lora.rank", config.lora.rank, f"at most {smallest}, a side of the model's weights")
    divided = {
        "tp": (
            ("the model's num_heads", m.num_heads),
            ("the model's num_kv_heads", m.num_kv_heads),
            ("the model's intermediate_size", m.intermediate_size),
            ("the model's vocab_size", m.vocab_size),
        ),
        "fsdp": (
            # each process has its own slots
            (f"config.sampler.slots{each}", config.sampler.slots * process_count),
            (f"config.sampler.prefill_rows{each}", config.sampler.prefill_rows * process_count),
            ("the model's hidden_size", m.hidden_size),
        ),
    }
    for axis, size in (("tp", tp), ("fsdp", fsdp)):
        for what, number in divided[axis]:
            if number % size:
                fits = [d for d in _divisors(device_count) if number % d == 0]
                raise UserError(
                    f"config.mesh.{axis}={size} does not divide {what} = {number}; with "
                    f"{device_count} device(s) it can be one of {fits}"
                )
    what = "an answer" if is_chat(config) else "a game"
    stages = {
        f"{what} with knowledge (sampler.max_prompt + extract.l_max + sampler.max_response)": sum(
            play_budget(config, True)
        ),
    }
    if has_extractor(config):
        name = "the extractor (extract.max_prompt + extract.l_max)"
        stages[name] = sum(extractor_budget(config))
    for what, length in stages.items():
        if length > m.max_positions:
            raise UserError(
                f"{what} may need {length} tokens, but the model was made for "
                f"{m.max_positions} positions; lower these config fields"
            )
