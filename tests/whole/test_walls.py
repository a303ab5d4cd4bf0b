"""The walls of the house, kept by following imports without running them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import HANG

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "oel_jax"


def modules_of(root):
    """Every module of the package under `root`: dotted name -> file."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name, path, *, when_imported=False):
    """Dotted names that a module imports; with `when_imported` only those run by importing it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    nodes = [ast.parse(path.read_text())]
    names = set()
    while nodes:
        node = nodes.pop()
        if when_imported and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def reachable(start, modules, *, when_imported=False):
    """All imported names, through any chain of the package's modules -> the chain that leads there.

    Importing a module runs its parent packages too; of those only what runs at import counts.
    """
    chains, stack = {}, [(start, (start,), when_imported)]
    visited = set()
    while stack:
        name, chain, lazy_too = stack.pop()
        if (name, lazy_too) in visited or name not in modules:
            continue
        visited.add((name, lazy_too))
        parents = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
        stack += [(parent, (*chain, parent), True) for parent in parents]
        for target in imports_of(name, modules[name], when_imported=lazy_too):
            chains.setdefault(target, (*chain, target))
            stack.append((target, (*chain, target), lazy_too))
    return chains


def within(name, room):
    return name == room or name.startswith(room + ".")


def violations(root, rooms, forbidden, *, when_imported=False):
    modules = modules_of(root)
    broken = []
    for room in rooms:
        members = [name for name in modules if within(name, f"{PACKAGE}.{room}")]
        assert members, f"the room {PACKAGE}.{room} does not exist"
        for member in members:
            for target, chain in reachable(member, modules, when_imported=when_imported).items():
                if any(within(target, wall) for wall in forbidden):
                    broken.append(" -> ".join(chain))
    return broken


@pytest.mark.parametrize("room", ["learner", "models", "chat", "sampler", "distill", "parallel"])
def test_the_server_side_never_imports_a_game(room):
    assert (
        violations(ROOT, [room], [f"{PACKAGE}.environments", f"{PACKAGE}.actor", "textarena"]) == []
    )


@pytest.mark.parametrize(
    "room", ["data", "logs", "runs.workdir", "environments", "config.defaults"]
)
def test_rooms_without_jax(room):
    jax = ["jax", "jaxlib", "flax", "optax", "orbax", "jaxtyping"]
    assert violations(ROOT, [room], jax) == []


def test_only_games_imports_textarena():
    users = {
        name
        for name, path in modules_of(ROOT).items()
        if any(within(target, "textarena") for target in imports_of(name, path))
    }
    assert users and all(within(name, f"{PACKAGE}.environments") for name in users)


def test_only_main_loop_and_report_know_both_sides():
    """No other module imports a stage of the user side and one of the server side."""
    modules = modules_of(ROOT)
    user = [
        f"{PACKAGE}.{room}"
        for room in ("actor.deploy", "actor.evaluate", "actor.preflight", "environments")
    ]
    server = [f"{PACKAGE}.{room}" for room in ("learner.extract", "learner.consolidate")]
    both = set()
    for name, path in modules.items():
        targets = imports_of(name, path)
        if all(any(within(t, stage) for t in targets for stage in side) for side in (user, server)):
            both.add(name)
    assert both <= {f"{PACKAGE}.{room}" for room in ("main", "loop", "study")}


def test_at_run_time_games_and_texts_import_neither_jax_nor_textarena():
    code = (
        "import sys, oel_jax.environments\n"
        "from oel_jax.data import knowledge, prompts, trajectories\n"
        "print([m for m in ('jax', 'flax', 'torch', 'textarena') if m in sys.modules])\n"
        "oel_jax.environments.make('sokoban', 1)\n"
        "print([m for m in ('jax', 'flax') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG
    )
    assert done.stdout == "[]\n[]\n", done.stderr


def test_the_wall_test_sees_through_other_modules(tmp_path):
    """The checker itself: chains, relative and lazy imports, and packages' __init__ files."""
    files = {
        "__init__.py": "def load():\n    from .lm import model\n",
        "games/__init__.py": "import textarena as ta\n",
        "helpers.py": "def f():\n    from . import games\n",
        "extract.py": "from .helpers import f\n",
        "lm/__init__.py": "",
        "lm/model.py": "import jax.numpy as jnp\nfrom ..games import make\n",
        "prompts.py": "import re\n",
        "workdir.py": "from oel_jax.lm.model import x\n",
    }
    for name, text in files.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    games = [f"{PACKAGE}.games"]
    assert any("helpers" in chain for chain in violations(tmp_path, ["extract"], games))
    assert violations(tmp_path, ["lm"], games) != []
    assert violations(tmp_path, ["workdir"], ["jax"]) != []
    assert violations(tmp_path, ["prompts", "games"], ["jax"]) == []  # a lazy import in __init__
    (tmp_path / PACKAGE / "__init__.py").write_text("from .lm import model\n")
    assert violations(tmp_path, ["prompts"], ["jax"]) != []
    with pytest.raises(AssertionError, match="does not exist"):
        violations(tmp_path, ["distill"], games)
