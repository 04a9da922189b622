"""Tasks in lm-eval's format, and the functions that they name."""
