"""Models larger than memory: which weights stay, and how the others come when a pass needs them."""
