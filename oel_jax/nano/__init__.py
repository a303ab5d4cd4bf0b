"""A small model organism of experiential learning, and the code that trains it from scratch."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
MODEL_DIR = MODELS / "small"  # the model of the default run
