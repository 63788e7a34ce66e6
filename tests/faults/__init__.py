"""Runs that are killed, checkpoints that are damaged, and checkpoints that mean harm."""
