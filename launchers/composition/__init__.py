"""From the command line and conf/ to the config of each run."""
