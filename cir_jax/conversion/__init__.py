"""From checkpoints of other libraries to ours and back: files, one table per model, one engine."""
