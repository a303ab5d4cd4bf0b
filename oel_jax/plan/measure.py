"""What the compiler makes of a program: seconds to compile, bytes, collectives."""

import re
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from oel_jax.plan.collectives import Collective, parse
from oel_jax.plan.programs import Program


@dataclass(frozen=True)
class Compiled:
    """The compiler's word on one program; bytes of one device.

    Attributes:
      seconds: that compiling took, by the clock.
      cpu_seconds: the same of all cores together; what else the machine does makes no difference.
      arguments, temporaries: bytes; `outputs` are those that do not take an argument's place.
      flops, optimal_seconds: the compiler's own, where it gives some. It counts the body of a loop
        once, so they are far too low for a program with loops.
      collectives: with the loops around them.
      too_large: the compiler's message if it refused the program for lack of memory, else ''.
    """

    seconds: float
    cpu_seconds: float
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    flops: float | None = None
    optimal_seconds: float | None = None
    collectives: tuple[Collective, ...] = field(default=(), repr=False)
    too_large: str = ""

    @property
    def received(self) -> int:
        """Bytes that reach one device from others in one run."""
        return sum(one.total for one in self.collectives)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"received": self.received}


def compiled(program: Program) -> Compiled:
    """Compile a program for its devices; a program that is too large is a result, not an error."""
    began, cpu_began = time.perf_counter(), time.process_time()

    def took() -> tuple[float, float]:
        return time.perf_counter() - began, time.process_time() - cpu_began

    try:
        with jax.set_mesh(program.mesh):
            done = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        short = re.sub(r"^.*?RESOURCE_EXHAUSTED: ", "", message)
        return Compiled(*took(), too_large=short)
    spent = took()
    memory, cost = done.memory_analysis(), done.cost_analysis() or {}
    found = parse(done.as_text(), program.mesh.devices.size)
    return Compiled(
        *spent,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        cost.get("flops"),
        cost.get("optimal_seconds"),
        tuple(found),
    )
