"""Each command of the program: its `main` takes the arguments and returns the exit code."""
