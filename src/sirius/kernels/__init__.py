"""The arithmetic of a gated MLP with and without its neurons; `reference` defines what every kernel must compute."""
