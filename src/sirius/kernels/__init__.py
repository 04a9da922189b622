"""The arithmetic of a gated MLP with and without its neurons, on three operations that `reference` defines."""
