"""From documents to tokens on a disk."""
