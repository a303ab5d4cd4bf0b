"""What a config asks of an optimizer step, as the static settings of the jitted functions."""

import ml_collections

from oel_jax.config.choices import chosen_loss
from oel_jax.distill.lora import Lora
from oel_jax.distill.step import StepConfig
from oel_jax.distill.topk_kl import KLConfig, pick_support
from oel_jax.models.config import ModelConfig
from oel_jax.models.language_model import DTYPES


def loss_settings(config: ml_collections.ConfigDict) -> KLConfig:
    """The loss that a config asks for, see `chosen_loss`."""
    loss = config.loss
    return KLConfig(
        loss.top_k,
        loss.temperature,
        *chosen_loss(config),
        chunk=loss.chunk,
        pick=pick_support(config.negative_control),
    )


def step_settings(config: ml_collections.ConfigDict, cfg: ModelConfig) -> StepConfig:
    """The static part of a step, for a model of shape `cfg`."""
    settings, lora = config.consolidate, Lora.of(config.lora)
    return StepConfig(
        model=cfg,
        kl=loss_settings(config),
        dtype=DTYPES[config.model.dtype],
        remat=settings.remat,
        block=config.model.attention_block,
        retention=settings.retention,
        retention_weight=settings.retention_weight,
        trust=settings.teacher_rate if settings.teacher == "trust_region" else 0.0,
        lora=lora.scale if lora else 0.0,
    )
