"""Numerics of models: how stamps become tensors, how scores are judged."""
