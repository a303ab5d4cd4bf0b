"""A small model organism of experiential learning, and the code that trains it from scratch."""

from pathlib import Path

from oel_jax.errors import UserError

MODELS = Path(__file__).parent / "models"
MODEL_DIR = MODELS / "small"  # the model of the default run


def model_dir(size: str) -> Path:
    """The directory of a bundled model, 'small' for instance.

    Raises:
      UserError: there is no bundled model of that size; says which there are.
    """
    bundled = sorted(path.parent.name for path in MODELS.glob("*/config.json"))
    if size not in bundled:
        raise UserError(f"there is no bundled nano model {size!r}; choose {', '.join(bundled)}")
    return MODELS / size
