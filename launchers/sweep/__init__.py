"""Sweeps: many runs by one plan, of which each is an ordinary run."""
