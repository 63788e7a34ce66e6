"""Checkpoints on disk: layout and manifest, engine state, and the final model."""
