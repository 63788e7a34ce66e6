"""Measured comparisons with what a user would run otherwise; see docs/."""
