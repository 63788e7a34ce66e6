"""What a step of the training is spent on, as torch's profiler sees it."""
