"""batchproc."""
