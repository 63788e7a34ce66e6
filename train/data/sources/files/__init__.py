"""Local text files, read a piece or a row at a time and checked before a run starts."""
