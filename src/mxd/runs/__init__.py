"""A run on disk: configuration, snapshots, metrics log, progress display; knows nothing of what is trained."""
