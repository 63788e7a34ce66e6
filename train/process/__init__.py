"""This process among its peers: who it is, its group, its log, signals, and its end."""
