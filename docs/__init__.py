"""The chapters of the reference, and what makes parts of them out of the sources."""
