"""Runs and sweeps as one page that is read offline, and as pictures."""
