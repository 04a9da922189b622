"""Measurements at full size, on random weights: what decoding costs beside what reading the weights must cost."""
