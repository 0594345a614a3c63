"""Many machines: executors, clusters, campaigns."""
