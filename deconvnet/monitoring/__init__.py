"""What a run reports while it works: progress, TensorBoard, metrics.jsonl."""
