"""Softmax attention that reads a selection of the keys, as pure functions."""
