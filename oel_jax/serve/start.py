"""From flags to a running service: which policies, how large, recorded where."""

import argparse
from dataclasses import replace
from pathlib import Path

import ml_collections

from oel_jax.base.errors import UserError
from oel_jax.config.defaults import default
from oel_jax.config.file import load_config
from oel_jax.config.old_values import saved_config
from oel_jax.data.conversations import ConversationStore
from oel_jax.logs.redaction import Redactor, load_hook
from oel_jax.models.language_model import LanguageModel, load_model
from oel_jax.parallel.mesh import all_devices, make_mesh
from oel_jax.runs import acceptance
from oel_jax.runs.acceptance import Policy
from oel_jax.runs.compilation import keep_compiled
from oel_jax.runs.policies import sampler_params
from oel_jax.runs.workdir import Workdir
from oel_jax.sampler.config import SamplerConfig
from oel_jax.serve.completion_ids import CompletionIds, secret_of
from oel_jax.serve.engine import Engine, serving_sizes
from oel_jax.serve.guard import GuardLimits
from oel_jax.serve.measures import Measures
from oel_jax.serve.policies import ExchangeRules, Policies
from oel_jax.serve.recorder import Recorder
from oel_jax.serve.service import Limits, Service

_SLOTS, _PROMPT, _RESPONSE = 16, 2048, 1024  # of a model that belongs to no run


def make_service(given: argparse.Namespace) -> Service:
    """Load the policy and make what the routes need.

    Raises:
      UserError: there is no policy to serve, or it cannot be loaded; a flag does not fit it.
    """
    config = _config(given)
    keep_compiled(None if config is None else config.compilation_cache)
    workdir = None if given.workdir is None else Workdir(given.workdir)
    store = _store(given, workdir)
    policies = _policies(given, config, workdir)
    measures = Measures()
    thinking = given.thinking
    if thinking is None:
        thinking = config is not None and config.model.thinking
    return Service(
        policies,
        Recorder(store, required=given.record_required, on_write=measures.written),
        CompletionIds(b"" if store is None else secret_of(store.directory)),
        Limits(
            seconds=given.timeout,
            body=given.max_body,
            connections=given.connections,
        ),
        measures,
        bool(thinking),
    )


def _config(given: argparse.Namespace) -> ml_collections.ConfigDict | None:
    """The config of the run, if there is one: that of the workdir, else that of the flag."""
    file = None if given.workdir is None else Workdir(given.workdir).config_file
    if file is not None and file.is_file():
        config = default()
        with config.ignore_type():
            config.update(saved_config(file))
        return config
    return None if given.config is None else load_config(given.config)


def _store(given: argparse.Namespace, workdir: Workdir | None) -> ConversationStore | None:
    if given.no_record or workdir is None:
        return None
    redactor = None
    if given.redact:
        redactor = Redactor(None if given.redact_hook is None else load_hook(given.redact_hook))
    return ConversationStore(workdir.conversations, redactor=redactor)


def _policies(
    given: argparse.Namespace, config: ml_collections.ConfigDict | None, workdir: Workdir | None
) -> Policies:
    if config is None:
        mesh = make_mesh(1, 1, all_devices()[:1])
    else:
        mesh = make_mesh(config.mesh.fsdp, config.mesh.tp)
    dtype = given.dtype or ("float32" if config is None else config.model.dtype)

    def load(policy: Policy) -> LanguageModel:
        today = None if workdir is None else Workdir(workdir.root).today
        model = load_model(policy.path, dtype=dtype, mesh=mesh, today=today)
        return model if config is None else _whole(config, model)

    def serve(model: LanguageModel, name: str) -> Engine:
        sizes = _sizes(given, config, model)
        try:
            return Engine(model, name, sizes, waiting=given.queue)
        except ValueError as error:
            raise UserError(f"--slots: {error}") from error

    how = ExchangeRules(
        period=given.period,
        canary=given.canary,
        shadow=given.shadow,
        guard=GuardLimits(answers=given.guard),
    )
    first, follow = _first(given, config, workdir)
    return Policies(load, serve, first, workdir=workdir if follow else None, how=how)


def _whole(config: ml_collections.ConfigDict, model: LanguageModel) -> LanguageModel:
    return replace(model, params=sampler_params(config, model.params))


def _first(
    given: argparse.Namespace, config: ml_collections.ConfigDict | None, workdir: Workdir | None
) -> tuple[Policy, bool]:
    """The policy to begin with, and whether newer ones of the workdir take its place.

    Raises:
      UserError: there is none.
    """
    if given.model is not None:
        name = given.model if ":" in given.model else Path(given.model).name
        return Policy(name or "model", given.model), False
    if config is None:
        raise UserError(
            f"--workdir={given.workdir} holds no run yet: give --config=FILE, whose model is "
            "served until the first round is finished, or --model=DIR"
        )
    if workdir.config_file.is_file():
        return acceptance.newest_policy(workdir), True
    return Policy(acceptance.START, config.model.path), True


def _sizes(
    given: argparse.Namespace, config: ml_collections.ConfigDict | None, model: LanguageModel
) -> SamplerConfig:
    """Sizes by the flags, else by the run's config.

    Raises:
      UserError: prompt and answer do not fit the model's positions.
    """
    devices, most = model.mesh.shape["fsdp"], model.cfg.max_positions
    s = None if config is None else config.sampler
    slots = given.slots or (_SLOTS if s is None else s.slots)
    slots += -slots % devices
    response = given.max_response or min(_RESPONSE if s is None else s.max_response, most // 2)
    prompt = given.max_prompt or min(_PROMPT if s is None else s.max_prompt, most - response)
    if prompt + response > most:
        raise UserError(
            f"--max_prompt={prompt} and --max_response={response} do not fit into the {most} "
            f"positions of {model.directory}"
        )
    return serving_sizes(
        slots=slots,
        length=prompt + response,
        response=response,
        prefill_rows=devices * max(1, min(8, slots) // devices),
        decode_steps=given.decode_steps,
        dtype=model.params["embed"].dtype,
    )


def describe(service: Service) -> list[str]:
    """What is served, how large, and recorded where: lines for the start."""
    engine = service.policies.engine()
    sizes, store = engine.sizes, service.recorder.store
    where = "nowhere (--no_record)" if store is None else f"{store.directory}"
    return [
        f"policy   {engine.policy_name} ({engine.model.directory})",
        f"slots    {sizes.slots}, {sizes.length} tokens each, answers up to {sizes.response}",
        f"recorded {where}",
    ]
