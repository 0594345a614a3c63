"""Numerics: arrays in, new arrays out. No files, no cluster, no clock."""
