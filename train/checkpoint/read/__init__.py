"""Readers of checkpoints of every engine, and of other people's, as portable state."""
