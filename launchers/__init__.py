"""From a command line to running ranks; imports no torch."""
