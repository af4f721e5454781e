"""Source datasets, as people download them: one file a task, over one builder."""
