"""What this machine, and those of a hostfile, have; whether a run fits them."""
