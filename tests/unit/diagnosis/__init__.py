"""What is told of ranks that stand still; without ranks."""
