"""Measurements among ranks."""
