"""Holds the place of transformers' script of this name, which the tests do not run."""
