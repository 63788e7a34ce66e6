"""Files and command lines of other programs become overrides, every key accounted for."""
