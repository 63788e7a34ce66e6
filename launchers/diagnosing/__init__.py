"""What went wrong in a run, found out by making its steps again."""
