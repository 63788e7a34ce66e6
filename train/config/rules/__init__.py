"""What no two settings of a run may say together."""
