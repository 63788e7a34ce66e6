"""Runs seen from outside, by their files alone: tables, comparisons, and one as it goes."""
