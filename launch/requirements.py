"""Writes the requirements files from pyproject.toml, which says what each package is for.

python launch/requirements.py
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "requirements.txt": "",
    "requirements-eval.txt": "eval",
    "requirements-plan.txt": "plan",
    "requirements-serve.txt": "serve",
}


def text_of(file: str) -> str:
    """What a requirements file is to hold."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = FILES[file]
    packages = project["optional-dependencies"][extra] if extra else project["dependencies"]
    head = "# Made from pyproject.toml, with a reason for each: python launch/requirements.py\n"
    return head + "".join(f"{package}\n" for package in packages)


if __name__ == "__main__":
    for name in FILES:
        (ROOT / name).write_text(text_of(name), encoding="utf-8")
