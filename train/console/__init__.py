"""What a person sees of a process: its streams and its progress."""
