"""Evaluation: the lm-eval model, the paper's tasks, and grids of settings over them."""
