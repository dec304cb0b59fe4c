"""Reports of a run in progress: progress bar, log, TensorBoard, metrics.jsonl."""
