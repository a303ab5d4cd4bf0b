"""Plan a run: `python -m oel_jax.plan --config=FILE.py --target=v5p:4x4x4`.

Compiles the run's own programs for devices that are not at hand, and says whether they fit, what
limits them and what a round should take. Nothing is loaded, downloaded or run.

    --target=v5p:4x4x4, v5e:4x4, v6e:16x16     a TPU slice; needs libtpu (not with --no_compile),
                                               but no TPU
    --target=h200:8, h100:8                    GPUs; compiled with JAX's CUDA plugin, if installed
    --target=cpu:8                             virtual devices of this machine, to try it
    --config.FIELD=VALUE                       another value for this plan

Exit status: 0 the config fits; 2 it does not (a mesh and slots that fit are recommended), or a
mistake that can be mended.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import ml_collections

from oel_jax import environments
from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.config.budgets import has_extractor
from oel_jax.config.checks import validate
from oel_jax.config.command_line import read_overrides
from oel_jax.config.defaults import with_fields
from oel_jax.config.file import load_config
from oel_jax.models.config import ModelConfig
from oel_jax.plan import report
from oel_jax.plan.auto import settle_for
from oel_jax.plan.estimate import Plan
from oel_jax.plan.measure import Compiled, compiled
from oel_jax.plan.search import flags, on_target, ranked
from oel_jax.plan.shapes import model_shape
from oel_jax.plan.targets import Target, find
from oel_jax.plan.workload import Assumptions
from oel_jax.runs.console import waiting

TRIED = 3  # recommended meshes that are compiled, at most


def plan(
    config: ml_collections.ConfigDict,
    target: Target,
    assumed: Assumptions,
    *,
    compiling: bool = True,
    only: Sequence[str] = (),
) -> tuple[Plan | None, Plan | None, str]:
    """Plan a config that passed `validate`.

    Args:
      compiling: False counts by hand alone.
      only: names of the programs to compile; () = all.

    Returns:
      (the plan of the config as it is, or None if its mesh is not for this target or model; the
      plan that is recommended in its place where it does not fit; why it is, or '').

    Raises:
      UserError: the model's shape is unknown, or something is to wait in host memory.
    """
    away = config.consolidate.offload
    if away:
        raise UserError(
            f"config.consolidate.offload is {away!r}; the planner does not count host memory: plan "
            "with (), which tells at least as many bytes of a device"
        )
    cfg = model_shape(config.model.path)
    other = config.extract.model_path if has_extractor(config) else ""
    extractor = model_shape(other, "config.extract.model_path") if other else None
    config, decided = settle_for(config, cfg, target, extractor)
    if decided:
        print(decided, flush=True)
    shapes = (cfg, target, assumed, extractor)
    compiling = compiling and bool(target.devices)
    given, why = None, ""
    try:
        given = on_target(config, *shapes)
    except UserError as error:
        why = str(error)
        print(f"error: {why}", file=sys.stderr, flush=True)
    if given is not None:
        given = with_compiler(given, only) if compiling else given
        if given.fits:
            return given, None, ""
        why = report.verdict(given)
    return given, recommended(config, *shapes, compiling=compiling, only=only), why


def recommended(
    config: ml_collections.ConfigDict,
    cfg: ModelConfig,
    target: Target,
    assumed: Assumptions,
    extractor: ModelConfig | None = None,
    *,
    compiling: bool = True,
    only: Sequence[str] = (),
) -> Plan | None:
    """The config on the mesh and with the slots that suit the target best, or None if none fit.

    Raises:
      UserError: no mesh of the target suits the model.
    """
    for best in ranked(config, cfg, target, assumed, extractor)[:TRIED]:
        best = with_compiler(best, only) if compiling else best
        if best.fits:
            return best
    return None


def with_compiler(plan: Plan, only: Sequence[str]) -> Plan:
    """The plan with the compiler's word on its programs.

    The micro-batch of usual answers is counted by hand: it needs less than the widest one.
    """
    done: dict[str, Compiled] = {}
    with _no_cache():
        names = [n for n in plan.programs if (not only or n in only) and not n.endswith(", usual")]
        for number, name in enumerate(names, 1):
            began, what = time.perf_counter(), f"  compiling {number} of {len(names)}, {name}"
            with waiting(what, sys.stderr):
                done[name] = compiled(plan.programs[name])
            print(f"{what}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return replace(plan, compiled=done)


@contextmanager
def _no_cache() -> Iterator[None]:
    """Compile anew: seconds from a cache would say nothing."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


# --- command --------------------------------------------------------------------------------------


def _config(text: str, changes: dict[str, Any]) -> ml_collections.ConfigDict:
    """FILE.py or FILE.py:PRESET with changed fields, checked."""
    config = with_fields(load_config(text), changes)
    for remark in validate(config, games=environments.known(config.game)):
        print(f"note: {remark}")
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m oel_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:PRESET")
    parser.add_argument("--game_module", help="Python file with a game of your own")
    parser.add_argument("--target", required=True, help="devices, e.g. v5p:4x4x4 or h200:8")
    parser.add_argument("--memory_gb", type=float, help="of one device, in place of the table's")
    parser.add_argument("--no_compile", action="store_true", help="count by hand: seconds, rough")
    parser.add_argument("--out", type=paths.argument, help="also write all numbers as JSON")
    assumed = parser.add_argument_group("assumptions of the estimate")
    for one in fields(Assumptions):
        default = f"default {one.default:g}" if one.name != "answer_tokens" else "640 or 300"
        assumed.add_argument(f"--{one.name}", type=one.type, help=f"see workload.py; {default}")
    return parser


def _assumptions(config: ml_collections.ConfigDict, options: argparse.Namespace) -> Assumptions:
    given = {one.name: getattr(options, one.name) for one in fields(Assumptions)}
    for name, value in given.items():
        most = 1 if name in ("occupancy", "compute", "memory", "network") else float("inf")
        least = 0 if name == "header_tokens" else 1e-6
        if value is not None and not least <= value <= most:
            limit = f" and at most {most:g}" if most == 1 else ""
            raise UserError(f"--{name}={value:g}: give a number above 0{limit}")
    return Assumptions.of(config, **given)


def _run(options: argparse.Namespace, changes: dict[str, Any]) -> int:
    if options.game_module:
        changes = changes | {"game.module": options.game_module}
    config = _config(options.config, changes)
    assumed = _assumptions(config, options)
    target = find(options.target, compiling=not options.no_compile)
    if options.memory_gb is not None:
        if not options.memory_gb > 0:
            raise UserError(f"--memory_gb={options.memory_gb:g}: give a number above 0")
        device = replace(target.device, memory=int(options.memory_gb * 1e9))
        target = replace(target, device=device)
    given, best, why = plan(config, target, assumed, compiling=not options.no_compile)
    name = Path(options.config.partition(":")[0]).name
    if given is not None:
        print(report.full_report(given, name))
    if not why:
        _say_quicker(given)
    if best is not None:
        print(f"\n=== this would fit: {flags(best)} ===\n\n{report.full_report(best, name)}")
    elif why:
        print(
            f"\nno mesh and number of slots of {target.text} was found that fits; take more "
            "devices, or set config.consolidate.moments_dtype=bfloat16, a lower "
            "config.extract.l_max or fewer config.extract.chains"
        )
    if options.out:
        both = {"given": given, "recommended": best}
        found = {key: report.as_json(one) for key, one in both.items() if one is not None}
        _write(options.out, json.dumps({"why": why} | found, indent=2) + "\n")
    return 2 if why else 0


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from error


def _say_quicker(given: Plan) -> None:
    """Another mesh, if by hand it looks much quicker."""
    a = given.arrays
    other = a.extractor if a.extractor is not a.cfg else None
    found = ranked(a.config, a.cfg, given.target, given.assumed, other)
    now = sum(given.by_hand.hours.values())
    if found and found[0].fits and (then := sum(found[0].hours.values())) < 0.7 * now:
        print(f"\nprobably quicker: {flags(found[0])}")
        print(f"({then:.2f} hours a round in place of {now:.2f}, both counted by hand; plan it)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    jax.config.update("jax_platforms", "cpu")  # whatever is here, nothing is run on it
    options, rest = _parser().parse_known_args(arguments)
    try:
        return _run(options, read_overrides(rest))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
