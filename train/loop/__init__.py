"""The training loop, and what is done around its steps."""
