"""The samplers of a run: how large each one is, and how it is built.

The sizes follow from the config and the mesh alone, so that the planner computes the same ones.
"""

from dataclasses import dataclass

import jax
import ml_collections

from oel_jax.config.budgets import extractor_budget, play_budget
from oel_jax.models.language_model import DTYPES, LanguageModel
from oel_jax.models.shared_prefix import SHARED_FROM
from oel_jax.sampler.sampler import Sampler
from oel_jax.sampler.sampling import Sampling

LANES = 4  # knowledge texts that are played with at the same time, at most


@dataclass(frozen=True, kw_only=True)
class SamplerLayout:
    """Sizes of one sampler, in sequences and tokens.

    Attributes:
      slots, rows: sequences decoded, and encoded, at once; multiples of the mesh's 'fsdp' size.
      prompt: of a request at most, its shared prefix not counted.
      response: of a request at most.
      length: of a slot's cache: prompt and response, unless `sampler.max_len` says otherwise.
      lanes, shared: shared prefixes held at once, and the tokens of the longest.
      draft: drafted in each pass; 0: none.
    """

    slots: int
    rows: int
    prompt: int
    response: int
    length: int
    lanes: int
    shared: int
    draft: int


def slot_count(config: ml_collections.ConfigDict, fsdp: int, wanted: int = 0) -> int:
    """Slots of a sampler: the config's, or as few as `wanted` requests need (0: no limit)."""
    most = config.sampler.slots
    return min(most, -(-wanted // fsdp) * fsdp) if wanted else most


def lane_count(fsdp: int, texts: int, slots: int) -> int:
    """How many of `texts` shared prefixes are read at once; their slots are equally many.

    With several, slots that one text no longer needs do not stand still until all its games
    have ended; with many, each is read for few slots.
    """
    each = slots // fsdp
    return max(m for m in range(1, LANES + 1) if m == 1 or (m <= texts and each % m == 0))


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
) -> SamplerLayout:
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
    return SamplerLayout(
        slots=slots,
        rows=min(s.prefill_rows, slots),
        prompt=prompt,
        response=response,
        length=s.max_len or prompt + response,
        lanes=lane_count(fsdp, texts, slots),
        shared=shared,
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
) -> SamplerLayout:
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


def extraction_layout(config: ml_collections.ConfigDict, fsdp: int, chains: int) -> SamplerLayout:
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


def sampling(section: ml_collections.ConfigDict) -> Sampling:
    """Sampling settings of a config section (`deploy`, `extract`, `evaluate`)."""
    return Sampling(section.temperature, section.top_k, section.top_p)


def build_sampler(
    config: ml_collections.ConfigDict,
    model: LanguageModel,
    mesh: jax.sharding.Mesh,
    how: Sampling,
    sizes: SamplerLayout,
) -> Sampler:
    """A sampler of these sizes.

    Args:
      model: its shape, vocabulary and stop ids; weights come with each call of the sampler.
      mesh: the devices of this process.
    """
    s = config.sampler
    return Sampler(
        model.cfg,
        mesh,
        slots=sizes.slots,
        max_len=sizes.length,
        max_new=sizes.response,
        how=how,
        limit=model.vocab_limit,
        stop_ids=model.tokenizer.stop_ids,
        dtype=DTYPES[config.model.dtype],
        decode_steps=s.decode_steps,
        prefill_rows=sizes.rows,
        prefill_chunk=s.prefill_chunk,
        longest_prefix=sizes.shared,
        prefixes=sizes.lanes,
        block=config.model.attention_block,
        overlap=s.overlap,
        draft=sizes.draft,
    )
