"""The processes of a run: their command, environment and files, and their end."""
