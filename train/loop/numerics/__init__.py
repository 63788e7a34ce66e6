"""What each module computes, looked at from outside: ranges, fingerprints, the first that fails."""
