"""Tiers: which tests run unless all are asked for, and that none of them is slow.

The default tier is every test without one of the markers in pyproject.toml. It is everything that
`pytest` and `bash tests/run.sh` run; `--all` adds the other tiers, and so does naming a file, a
test or a marker (`-m mesh`).

A test of the default tier that takes more than `LIMIT` seconds of processor time (its process and
the children that it waited for; a loaded machine does not add to it) makes a session of that tier
fail. It is only named, and nothing fails, where `judged` is false: with few compiled programs kept,
compiling takes most of the time.
"""

import os
from collections import Counter
from collections.abc import Iterator

import pytest

TIERS = ("aot", "e2e", "lm_eval", "mesh", "nano", "notebook", "processes", "signals", "slow")
LIMIT = 20.0
HANG = 1800.0  # seconds after which a process is taken to hang; no test measures time by it
judged = True  # conftest.py says no while the compile cache is nearly empty

_SPENT = "processor_seconds"
_left_out: Counter[str] = Counter()
_too_slow: list[str] = []


def meshes(default: tuple[int, int], *others: tuple[int, int]) -> list:
    """Parameters for a test on meshes ('fsdp', 'tp'): one in the default tier, others in `mesh`."""
    return [default, *(pytest.param(shape, marks=pytest.mark.mesh) for shape in others)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the slower tiers too (tests/tiers.py)")


def tiers_of(item: pytest.Item) -> set[str]:
    """The slower tiers a test is in; none for the default tier."""
    return {mark.name for mark in item.iter_markers() if mark.name in TIERS}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = any(".py" in argument for argument in config.args)
    if not (config.option.all or config.option.markexpr or named):
        slower = [item for item in items if tiers_of(item)]
        config.hook.pytest_deselected(items=slower)
        items[:] = [item for item in items if not tiers_of(item)]
        _left_out.update(min(tiers_of(item)) for item in slower)
    # Files with slow tests first, so that no worker is left with one at the end.
    slow_files = Counter(item.path for item in items for _ in tiers_of(item))
    items.sort(key=lambda item: -slow_files[item.path])


def _processor_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = _processor_seconds()
    try:
        return (yield)
    finally:
        if not tiers_of(item):
            item.user_properties.append((_SPENT, _processor_seconds() - before))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Also in the first process of pytest-xdist, which gets the reports of its workers."""
    spent = dict(report.user_properties).get(_SPENT, 0.0)
    if report.when == "call" and spent > LIMIT:
        _too_slow.append(f"{report.nodeid}: {spent:.0f} s of processor time")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["left_out"] = dict(_left_out)
    elif _fails(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _fails(config: pytest.Config) -> bool:
    return bool(_too_slow) and judged and not config.option.all


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    _left_out.clear()  # each worker collects all tests
    _left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _too_slow:
        terminalreporter.section(f"over {LIMIT:g} s: make it faster or mark its tier", red=True)
        for line in _too_slow:
            terminalreporter.write_line(line)
    if _left_out:
        tiers = ", ".join(f"{name} {count}" for name, count in sorted(_left_out.items()))
        terminalreporter.write_line(
            f"left out: {_left_out.total()} of slower tiers ({tiers}); "
            "bash tests/run.sh --all runs them"
        )
