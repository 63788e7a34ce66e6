"""What lies in the cache: shown, verified, removed."""
