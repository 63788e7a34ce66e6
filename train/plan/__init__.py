"""What a plan needs to know of a model, found out where there is torch; a child of the launcher."""
