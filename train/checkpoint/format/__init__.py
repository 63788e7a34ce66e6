"""A checkpoint on a disk: its files, their hashes, its manifest, tensors read when needed."""
