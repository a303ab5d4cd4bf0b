"""Devices, and topologies of them that a program can be compiled for without having them."""

import dataclasses
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from oel_jax.base.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One accelerator; peaks, as its maker states them.

    Attributes:
      name: as people call it.
      memory: bytes that a program can use.
      flops: bfloat16 FLOP per second (dense).
      bandwidth: bytes per second to and from its memory.
      link: bytes per second that reach it from the other devices, within a node or a pod slice.
      node: devices in a node; between nodes `far` counts in place of `link`. 0: no nodes.
      far: bytes per second that reach it from other nodes.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    node: int = 0
    far: float = 0.0


# TPU: Cloud TPU documentation, pages "TPU v5e", "TPU v5p" and "TPU v6e": peak compute, HBM
# bandwidth and inter-chip bandwidth per chip (1600, 4800 and 3200 Gbit/s). Memory: the limit that
# libtpu's compiler itself names when a program is too large (15.75, 95.74 and 31.25 GiB).
TPUS = {
    "v5e": Device("TPU v5e", int(15.75 * GIB), 197e12, 819e9, 200e9),
    "v5p": Device("TPU v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9),
    "v6e": Device("TPU v6e", int(31.25 * GIB), 918e12, 1600e9, 400e9),
}

# NVIDIA's data sheets of the SXM boards: 989 TFLOP/s without sparsity, 3.35 and 4.8 TB/s, NVLink
# 900 GB/s both ways together, 8 to a node (HGX); between nodes one 400 Gbit/s port for each GPU.
# Of the memory, JAX keeps what XLA_PYTHON_CLIENT_MEM_FRACTION says, 0.75 if it is not set; what it
# leaves is for NCCL and the CUDA context.
GPUS = {
    "h100": Device("NVIDIA H100 80GB", 80 * GIB, 989e12, 3350e9, 450e9, 8, 50e9),
    "h200": Device("NVIDIA H200 141GB", int(140.4 * GIB), 989e12, 4800e9, 450e9, 8, 50e9),
}
MEMORY_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
DEFAULT_SHARE = 0.92  # what the launch scripts set


@dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
      text: as it was given, e.g. 'v5p:4x4x4'.
      device: what each is.
      count: how many.
      each: devices of one process: of one host.
      devices: JAX's descriptions of all, to compile for; empty if that is not possible here.
      host: the same of one process. (A part of `devices` would not do: libtpu compiles for whole
        slices only.)
      why: why not, in a sentence; '' if it is possible.
    """

    text: str
    device: Device
    count: int
    each: int
    devices: tuple[Any, ...] = ()
    host: tuple[Any, ...] = ()
    why: str = ""

    @property
    def processes(self) -> int:
        return self.count // self.each

    @property
    def link(self) -> float:
        """Bytes per second that reach a device when all exchange something."""
        many_nodes = self.device.node and self.count > self.device.node
        return self.device.far if many_nodes else self.device.link


def find(text: str, compiling: bool = True) -> Target:
    """The target 'v5p:4x4x4', 'h200:8' or 'cpu:8'.

    Args:
      compiling: False asks for no compiler: the target has no devices to compile for.

    Raises:
      UserError: there is no such target, or what is needed to compile for it is not installed.
    """
    kind, _, size = text.partition(":")
    if kind in TPUS and re.fullmatch(r"\d+(x\d+){1,2}", size):
        return _tpu(text, TPUS[kind]) if compiling else _counted(text, TPUS[kind])
    if kind in GPUS and re.fullmatch(r"[1-9]\d{0,4}", size):
        return _gpu(text, GPUS[kind], int(size))
    if kind == "cpu" and re.fullmatch(r"[1-9]\d{0,3}", size):
        return _cpu(text, int(size))
    raise UserError(
        f"--target={text}: no such target; give a TPU slice as {', '.join(TPUS)} with its shape "
        f"(v5p:4x4x4, v5e:4x4), GPUs as {', '.join(GPUS)} with their number (h200:8), or cpu:8"
    )


def _counted(text: str, device: Device) -> Target:
    """A TPU slice without libtpu: its shape alone, with the hosts that libtpu would tell of."""
    sides = [int(side) for side in text.partition(":")[2].split("x")]
    count = math.prod(sides)
    if not count:
        raise UserError(f"--target={text}: a slice has at least one chip on each side")
    each = min(count, 4)  # 2 x 2 chips on a host
    if count % each:
        raise UserError(f"--target={text}: {count} chips do not fill hosts of {each}")
    return Target(text, device, count, each, why="nothing is to be compiled (--no_compile)")


def _tpu(text: str, device: Device) -> Target:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--target={text}: compiling for a TPU needs libtpu, which is not installed here; no "
            "TPU is needed: pip install libtpu, or --no_compile counts by hand"
        )
    # Nothing is run: libtpu need not look for its machine, nor keep other processes out.
    for name, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", text.replace(":", "-")),
    ):
        os.environ.setdefault(name, value)
    try:
        devices = topologies.get_topology_desc(text, "tpu").devices
        each = sum(one.process_index == devices[0].process_index for one in devices)
        host = devices
        if each < len(devices):  # libtpu puts 2 x 2 chips on a host
            kind, flat = text.partition(":")[0], text.count("x") == 1
            host = topologies.get_topology_desc(f"{kind}:{'2x2' if flat else '2x2x1'}", "tpu")
            host = host.devices
    except Exception as error:  # libtpu's own kinds of error
        reason = str(error).splitlines()[0]
        raise UserError(f"--target={text}: libtpu does not take it: {reason}") from error
    return Target(text, device, len(devices), each, tuple(devices), tuple(host))


def _gpu(text: str, device: Device, count: int) -> Target:
    share = float(os.environ.get(MEMORY_SHARE, DEFAULT_SHARE))
    if not 0 < share <= 1:
        raise UserError(f"{MEMORY_SHARE}={share:g} must be above 0 and at most 1")
    usable = dataclasses.replace(device, memory=int(device.memory * share))
    each = min(count, device.node)
    if count % each:
        raise UserError(
            f"--target={text}: several nodes have {device.node} GPUs each; give a multiple of that"
        )
    plain = Target(text, usable, count, each)
    try:
        plugins = [f"jax_plugins.xla_cuda{version}" for version in (12, 13)]
        there = any(importlib.util.find_spec(name) for name in plugins)
    except ModuleNotFoundError:  # no plugin of any kind
        there = False
    if not there:
        return dataclasses.replace(plain, why="JAX's CUDA plugin is not installed here")
    described = _described(device)
    try:
        devices, host = (
            topologies.get_topology_desc(
                "", "cuda", target_config=described, topology=f"1x{nodes}x{each}"
            ).devices
            for nodes in (count // each, 1)
        )
    except Exception as error:  # the plugin's own kinds of error
        return dataclasses.replace(plain, why=f"the CUDA plugin: {str(error).splitlines()[0]}")
    return dataclasses.replace(plain, devices=tuple(devices), host=tuple(host))


def _described(device: Device) -> str:
    """What XLA asks of a GPU, as text."""
    text = Path(__file__).with_name("hopper.txtpb").read_text()
    for word, value in (
        (": BANDWIDTH", f": {int(device.bandwidth)}"),
        (": MEMORY", f": {device.memory}"),
        ('"NAME"', f'"{device.name}"'),
    ):
        text = text.replace(word, value)
    return text


def _cpu(text: str, count: int) -> Target:
    """Virtual devices of this machine, to try the planner; they share its memory."""
    try:
        jax.config.update("jax_num_cpu_devices", max(count, jax.config.jax_num_cpu_devices))
    except RuntimeError:
        pass  # JAX has started; it may have enough of them
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--target={text}: JAX has started with {len(devices)} CPU device(s) in this process; "
            "plan in its own process"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Rough figures of one core: they keep the arithmetic going and are no claim.
    device = Device("CPU (a virtual device)", memory // count, 1e11, 1e10, 5e9)
    return Target(text, device, count, count, *[tuple(devices[:count])] * 2)
