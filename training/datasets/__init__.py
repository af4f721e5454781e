"""From source datasets, as people download them, to shards of samples: one file a task."""
