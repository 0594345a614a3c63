"""How good classifiers are on candidates of known truth: ``batchproc evaluate classifier``.

A table, or a run with its truth, becomes candidates with scores (`candidates`); scores become numbers with intervals,
each with the mixture of real and bogus that it holds for (`measures`); numbers become words and files (`evaluate`),
and a picture (`drawing`). The arithmetic is in `batchproc.learning.evaluate`.
"""
