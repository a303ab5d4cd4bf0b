"""The samplers of a run: how large each one is, and how it is built.

The sizes follow from the config and the mesh alone, so that the planner computes the same ones.
"""

from collections.abc import Iterable

import jax
import ml_collections

from oel_jax.base.errors import UserError
from oel_jax.config.budgets import extractor_budget, play_budget
from oel_jax.models.language_model import DTYPES, LanguageModel
from oel_jax.models.lengths import SHARED_FROM
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Request, RequestError, Sampling
from oel_jax.sampler.sampler import Sampler

MOST_PREFIXES = 4  # knowledge texts that are played with at the same time, at most


def slot_count(config: ml_collections.ConfigDict, fsdp: int, wanted: int = 0) -> int:
    """Slots of a sampler: the config's, or as few as `wanted` requests need (0: no limit)."""
    most = config.sampler.slots
    return min(most, -(-wanted // fsdp) * fsdp) if wanted else most


def prefix_count(fsdp: int, texts: int, slots: int) -> int:
    """How many of `texts` shared prefixes are read at once; their slots are equally many.

    With several, slots that one text no longer needs do not stand still until all its games
    have ended; with many, each is read for few slots.
    """
    each = slots // fsdp
    return max(m for m in range(1, MOST_PREFIXES + 1) if m == 1 or (m <= texts and each % m == 0))


def layout(
    config: ml_collections.ConfigDict,
    fsdp: int,
    *,
    prompt: int,
    response: int,
    requests: int = 0,
    texts: int = 0,
    shared: int = 0,
    draft: int = 0,
) -> SamplerConfig:
    """Sizes of a sampler for prompts of up to `prompt` tokens and responses of up to `response`.

    Args:
      fsdp: devices along that axis of the mesh the sampler is on.
      requests: that can run at once, if these may be fewer than the config's slots; 0: any number.
      texts: shared prefixes; `prompt` does not count them.
      shared: tokens of the longest of these.
      draft: tokens to draft in each pass.
    """
    s = config.sampler
    slots = slot_count(config, fsdp, requests)
    return SamplerConfig(
        slots=slots,
        length=s.max_len or prompt + response,
        response=response,
        prefill_rows=min(s.prefill_rows, slots),
        prefixes=prefix_count(fsdp, texts, slots),
        longest_prefix=shared,
        decode_steps=s.decode_steps,
        prefill_chunk=s.prefill_chunk,
        block=config.model.attention_block,
        dtype=DTYPES[config.model.dtype],
        overlap=s.overlap,
        draft=draft,
    )


def play_layout(
    config: ml_collections.ConfigDict,
    fsdp: int,
    *,
    informed: bool,
    texts: int,
    shared: int,
    requests: int = 0,
) -> SamplerConfig:
    """Sizes of a sampler that plays games.

    Args:
      informed: whether prompts show a knowledge text.
      texts, shared, requests: see `layout`.
    """
    prompt, response = play_budget(config, False)
    if informed:  # room for a text that is too short to be shared, and for merges at its ends
        prompt += SHARED_FROM + 16
    return layout(
        config,
        fsdp,
        prompt=prompt,
        response=response,
        requests=requests,
        texts=texts,
        shared=shared,
    )


def extraction_width(config: ml_collections.ConfigDict) -> int:
    """Extraction steps of one chain that are generated together.

    One, while a step needs the text of the last.
    """
    return 1 if config.extract.previous else max(1, config.sampler.slots // config.extract.chains)


def extraction_layout(config: ml_collections.ConfigDict, fsdp: int, chains: int) -> SamplerConfig:
    """Sizes of the extractor's sampler, for this many chains."""
    prompt, response = extractor_budget(config)
    return layout(
        config,
        fsdp,
        prompt=prompt,
        response=response,
        requests=extraction_width(config) * chains,
        draft=config.extract.draft_tokens,
    )


def coach_layout(config: ml_collections.ConfigDict, fsdp: int) -> SamplerConfig:
    """Sizes of the sampler that writes a text for each answer."""
    prompt, response = extractor_budget(config)
    draft = config.extract.draft_tokens
    return layout(config, fsdp, prompt=prompt, response=response, draft=draft)


def sampling(section: ml_collections.ConfigDict) -> Sampling:
    """Sampling settings of a config section (`deploy`, `extract`, `evaluate`)."""
    return Sampling(section.temperature, section.top_k, section.top_p)


class RunSampler(Sampler):
    """A sampler whose limits are named as the config's fields are."""

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests.

        Raises:
          UserError: one does not fit.
        """
        try:
            super().submit(requests)
        except RequestError as error:
            raise UserError(
                f"{error}: raise config.sampler.max_prompt or config.sampler.max_response (games), "
                "config.extract.max_prompt or config.extract.l_max (extractor), or "
                "config.sampler.max_len if it is set"
            ) from error


def build_sampler(
    config: ml_collections.ConfigDict,
    model: LanguageModel,
    mesh: jax.sharding.Mesh,
    sampling: Sampling,
    sizes: SamplerConfig,
) -> Sampler:
    """A sampler of these sizes.

    Args:
      model: its shape, vocabulary and stop ids; weights come with each call of the sampler.
      mesh: the devices of this process.

    Raises:
      UserError: the slots or rows do not fit the mesh.
    """
    try:
        return RunSampler(
            model.cfg,
            mesh,
            sizes,
            sampling=sampling,
            limit=model.vocab_limit,
            stop_ids=model.tokenizer.stop_ids,
        )
    except ValueError as error:
        raise UserError(
            f"{error}; see config.sampler.slots, config.sampler.prefill_rows and config.mesh"
        ) from error
