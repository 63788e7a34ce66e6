"""From config and model to the optimizer."""
