"""Tests of the launcher, which start no torch in this process."""
