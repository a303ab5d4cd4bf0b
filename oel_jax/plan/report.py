"""A plan in words and tables, and as JSON."""

from dataclasses import asdict
from typing import Any

import jax.numpy as jnp

from oel_jax.plan.costs import parameters
from oel_jax.plan.estimate import Plan
from oel_jax.plan.search import flags
from oel_jax.runs.metrics import table

# Classes of bytes -> column; what the classes are called in `programs.living`.
_COLUMNS = {
    "student, float32": "parameters",
    "adapter, float32": "parameters",
    "policy": "parameters",
    "student's copy": "copy",
    "AdamW's moments": "optimizer",
    "restored": "restored",
    "gradients, float32": "gradients",
    "teacher": "teacher",
    "teacher's average, float32": "teacher",
    "KV cache": "KV cache",
    "rollout cache": "KV cache",
    "knowledge, encoded": "knowledge",
    "knowledge, the student's view": "knowledge",
}
_ORDER = list(dict.fromkeys(_COLUMNS.values()))


def gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def headline(plan: Plan, name: str) -> str:
    """What is planned for what."""
    target, config, cfg = plan.target, plan.arrays.config, plan.arrays.cfg
    hosts = f" of {target.processes} processes" if target.processes > 1 else ""
    where = plan.arrays.layout
    text = f"plan of {name} for {target.text}: {target.count} x {target.device.name}{hosts}, "
    text += f"{gb(target.device.memory)} GB each\n"
    text += f"model {config.model.path}, {parameters(cfg) / 1e9:.2f} billion parameters; "
    text += f"mesh fsdp {where.fsdp} x tp {where.tp}, {plan.arrays.work.play.slots} slots"
    return text + (" in each process" if target.processes > 1 else "")


def memory(plan: Plan) -> str:
    """Bytes of one device by class and stage: what lives together."""
    columns = [c for c in _ORDER if any(_COLUMNS[k] == c for s in plan.stages for k in s.held)]
    rows = []
    for stage in plan.stages:
        cells = [
            sum(size for name, size in stage.held.items() if _COLUMNS[name] == column)
            for column in columns
        ]
        of = f" ({stage.hungriest})" if stage.hungriest else ""
        shown = [gb(size) if size else "-" for size in cells]
        refused = any(plan.programs[name].stage == stage.name for name in plan.too_large)
        temporaries = "too large" if refused else gb(stage.temporaries)
        total = "-" if refused else gb(stage.total)
        margin = "-" if refused else f"{1 - stage.total / plan.target.device.memory:.0%}"
        rows.append([f"{stage.name}{of}", *shown, temporaries, total, margin])
    text = table(rows, ["GB of one device", *columns, "temporaries", "together", "left"])
    for name, message in plan.too_large.items():
        text += f"\n{name}: the compiler refuses it: {message}"
    return text


def verdict(plan: Plan) -> str:
    if plan.too_large:
        return "DOES NOT FIT: the compiler refuses " + " and ".join(plan.too_large)
    most, size = plan.most, plan.target.device.memory
    text = f"at most {gb(most.total)} of {gb(size)} GB, in the stage '{most.name}'"
    if plan.fits:
        return f"FITS: {text}; {plan.margin:.0%} left"
    return f"DOES NOT FIT: {text}; {gb(most.total - size)} GB too much"


def work(plan: Plan) -> str:
    """What each program computes, reads and sends, and what limits it."""
    rows = []
    for name, one in plan.costs.items():
        time, done = plan.times[name], plan.compiled.get(name)
        optimal = done.optimal_seconds if done and done.optimal_seconds else None
        rows.append(
            [
                name,
                f"{one.flops / 1e12:,.3f}",
                gb(one.bytes),
                gb(one.sent),
                _seconds(time.seconds),
                time.bound,
                _seconds(optimal) if optimal and optimal > 0 else "-",
                f"{done.seconds:.0f} s" if done else "-",
            ]
        )
    headers = ["one run, one device", "TFLOP", "GB memory", "GB network", "estimate", "bound by"]
    headers += ["compiler's*", "to compile"]
    return table(rows, headers) + (
        "\ndecode: one token of every slot. FLOP and GB of memory are counted by hand, GB of the "
        "network from the\ncompiled text where there is one. *the compiler counts the body of a "
        "loop once: far too low"
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def network(plan: Plan) -> str:
    """Collectives of each compiled program."""
    rows = []
    for name, done in plan.compiled.items():
        kinds: dict[str, list[Any]] = {}
        for one in done.collectives:
            kinds.setdefault(one.kind, []).append(one)
        for kind, found in kinds.items():
            largest = max(found, key=lambda one: one.bytes)
            rows.append(
                [
                    name,
                    kind,
                    sum(one.times for one in found),
                    f"{largest.bytes / 1e6:,.1f}",
                    f"{sum(one.total for one in found) / 1e6:,.1f}",
                ]
            )
    if not rows:
        return "no program sends anything between devices" if plan.compiled else ""
    headers = ["collectives", "kind", "times", "largest MB", "MB received by a device"]
    return table(rows, headers)


def round_hours(plan: Plan) -> str:
    """Estimated hours of a round."""
    assumed, hours = plan.assumed, plan.hours
    rows = [
        [name, f"{value:.2f}", f"{value * plan.target.count:,.1f}"]
        for name, value in (hours | {"together": sum(hours.values())}).items()
    ]
    packing = f"{plan.arrays.work.batches} micro-batches a step, {plan.arrays.work.filled:.0%}"
    return table(rows, ["a round, estimated", "hours", "device-hours"]) + (
        f"\nassumed: {assumed.turns:g} turns a game, {assumed.answer_tokens:.0f} tokens an answer, "
        f"{assumed.extract_tokens:.0f} an extractor's,\n{assumed.compute:.0%} of peak compute, "
        f"{assumed.memory:.0%} of memory bandwidth, {assumed.network:.0%} of the network, "
        f"{assumed.occupancy:.0%} of slots busy;\n{packing} of their tokens not padding. Loading, "
        "saving, compiling and the games themselves are not in it"
    )


def full_report(plan: Plan, name: str) -> str:
    """The report."""
    parts = [headline(plan, name)]
    if plan.compiled:
        spent = sum(done.seconds for done in plan.compiled.values())
        parts[0] += f"\ncompiled ahead of time in {spent:.0f} s; nothing was run"
    else:
        why = plan.target.why or "as asked"
        parts[0] += f"\nnot compiled: {why}. All numbers are counted by hand"
    parts += [memory(plan), verdict(plan), work(plan), network(plan), round_hours(plan)]
    return "\n\n".join(part for part in parts if part)


def as_json(plan: Plan) -> dict[str, Any]:
    """All numbers of a plan."""
    target = plan.target
    times = plan.times
    return {
        "target": target.text,
        "device": asdict(target.device),
        "devices": target.count,
        "processes": target.processes,
        "not_compiled": target.why if not plan.compiled else "",
        "mesh": {"fsdp": plan.arrays.layout.fsdp, "tp": plan.arrays.layout.tp},
        "flags": flags(plan),
        "model": plan.arrays.config.model.path,
        "parameters": parameters(plan.arrays.cfg),
        "assumed": asdict(plan.assumed),
        "work": _plain(asdict(plan.arrays.work)),
        "fits": plan.fits,
        "margin": plan.margin,
        "stages": [asdict(stage) | {"total": stage.total} for stage in plan.stages],
        "programs": {
            name: asdict(one)
            | {"seconds": times[name].seconds, "bound": times[name].bound}
            | {"given": plan.programs[name].bytes}
            | ({"compiled": _compiled(plan, name)} if name in plan.compiled else {})
            for name, one in plan.costs.items()
        },
        "hours": plan.hours,
    }


def _plain(value: Any) -> Any:
    """The same with names in place of dtypes, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inside) for inside in value]
    plain = value is None or isinstance(value, str | int | float)
    return value if plain else jnp.dtype(value).name


def _compiled(plan: Plan, name: str) -> dict[str, Any]:
    return plan.compiled[name].as_json()
