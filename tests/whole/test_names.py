"""Two things never share a name, where code of one room may meet both."""

import ast
from pathlib import Path

import oel_jax

# Rooms that others build on. What the rooms of single commands call their own things meets nobody.
SHARED = (
    *("base", "chat", "config", "data", "distill", "learner", "models", "parallel", "runs"),
    "sampler",
)
ALLOWED: dict[str, str] = {}  # name -> why two of them are one thing


def public_names(room: Path) -> list[tuple[str, str]]:
    """(name, file) of the functions and classes at the top level of a room's modules."""
    return [
        (node.name, f"{room.name}/{path.name}")
        for path in sorted(room.glob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
    ]


def test_no_two_things_of_the_shared_rooms_have_one_name():
    places: dict[str, list[str]] = {}
    for room in SHARED:
        names = public_names(Path(oel_jax.__file__).parent / room)
        assert names, room
        for name, file in names:
            places.setdefault(name, []).append(file)
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert twice.keys() <= ALLOWED.keys(), twice
    assert ALLOWED.keys() <= twice.keys()  # what is mended leaves the list
