"""The models that are shipped with the package: `nano`, `nano:tiny` and so on."""

from pathlib import Path

from oel_jax.base.errors import UserError

MODELS = Path(__file__).parent.parent / "nano" / "models"
MODEL_DIR = MODELS / "small"  # the model of the default run


def model_dir(size: str) -> Path:
    """The directory of a bundled model, 'small' for instance.

    Raises:
      UserError: there is no bundled model of that size; says which there are.
    """
    there = sorted(path.parent.name for path in MODELS.glob("*/config.json"))
    if size not in there:
        raise UserError(f"there is no bundled nano model {size!r}; choose {', '.join(there)}")
    return MODELS / size


def resolve_bundled(path: str) -> str:
    """The model shipped with the package for 'nano' or 'nano:tiny'; any other path unchanged.

    Raises:
      UserError: there is no bundled model of that size.
    """
    name, colon, size = path.partition(":")
    if name != "nano":
        return path
    return str(model_dir(size) if colon else MODEL_DIR)
