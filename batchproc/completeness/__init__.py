"""Completeness and false alarms, measured and held against what Gaussian noise promises: ``batchproc evaluate``.

Sources of known flux are put into images (`campaign`); the whole flow runs on each; what it made of each source and of
the empty sky becomes a table (`sample`); tables become verdicts (`verdicts`) and drawings (`drawing`).
"""
