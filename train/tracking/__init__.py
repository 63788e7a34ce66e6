"""Where metrics go besides metrics.jsonl: a module for each tracker, and the process for all."""
