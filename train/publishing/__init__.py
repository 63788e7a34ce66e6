"""From a model directory to a repository on a hub."""
