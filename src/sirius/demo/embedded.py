"""Where the embedded model is."""

from pathlib import Path

from sirius.errors import ModelError

FOLDER = Path(__file__).parent / "model"


def check_embedded() -> None:
    """Raise ModelError where the package came without its model."""
    if not (FOLDER / "config.json").exists():
        raise ModelError(
            f"this installation holds no embedded model at {FOLDER}; runs/train.py of the project's sources makes one"
        )
