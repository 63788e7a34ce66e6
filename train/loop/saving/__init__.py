"""From a live training to a checkpoint."""
