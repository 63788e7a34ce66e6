"""Leaps of the loss and of the gradient norm: found, told, and what is done about them."""
