"""From config to a model with its first values, and the directory that it is kept in."""
