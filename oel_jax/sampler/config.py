"""How large a sampler is and how it works. What is sampled does not depend on it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Sizes of one sampler, in sequences and tokens.

    Attributes:
      slots: sequences that decode at once; a multiple of the mesh's 'fsdp' size.
      prefill_rows: prompts that are encoded at once; a multiple of it too.
      length: of a slot's cache: prompt and response after the shared prefix.
      response: tokens of a response, at most.
      prefixes: shared prefixes held at once; each is read by an equal part of the slots.
      longest_prefix: tokens of the longest of them; 0: none can be shared.
      decode_steps: tokens of each slot between two looks of the host, at most.
      prefill_chunk: longer prompts are encoded in pieces of so many tokens.
      block: query block of the attention that encodes a shared prefix.
      dtype: of keys and values in the caches; what reads or computes them has it too.
      overlap: `poll` returns the answers of the call before while the device decodes on.
      draft: tokens drafted from a slot's own text and verified in each pass; 0: none.
      stops: ids that can end one response, at most.
      any_settings: requests may bring settings of any kind and nothing is compiled for them: the
        number of candidates that are sorted is rounded up to one of a few.
      reuse: a prompt takes over whole chunks (`prefill_chunk`) that any prompt with the same
        beginning has left in a slot, see `sampler/reuse.py`; without shared prefixes only.
      follow: `Sampler.progress` has the tokens that running requests got in the last dispatch.
      seconds: a dispatch takes about so long at most; fewer tokens are decoded in one where it
        would take longer.
    """

    slots: int
    length: int
    response: int
    prefill_rows: int = 8
    prefixes: int = 1
    longest_prefix: int = 0
    decode_steps: int = 16
    prefill_chunk: int = 512
    block: int = 256
    dtype: Any = "float32"
    overlap: bool = False
    draft: int = 0
    stops: int = 8
    any_settings: bool = False
    reuse: bool = False
    follow: bool = False
    seconds: float = 5.0

    def check(self, fsdp: int) -> None:
        """Whether it fits a mesh with so many devices along 'fsdp'.

        Raises:
          ValueError: names the field that does not.
        """
        for name in ("slots", "prefill_rows"):
            value = getattr(self, name)
            if value < 1 or value % fsdp:
                raise ValueError(
                    f"{name} is {value}: it must be a positive multiple of the {fsdp} device(s) "
                    "along 'fsdp'"
                )
        if self.reuse and (self.longest_prefix or self.prefixes != 1):
            raise ValueError("with reuse there can be no shared prefixes: chunks are shared")
        if self.prefixes < 1 or self.slots // fsdp % self.prefixes:
            raise ValueError(
                f"{self.slots} slots on {fsdp} device(s) cannot be shared equally among "
                f"{self.prefixes} prefixes: slots must be a multiple of both"
            )
