"""Work on the hosts of a hostfile, started through their remote shell."""
