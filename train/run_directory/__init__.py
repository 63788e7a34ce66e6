"""The files of a run directory that are not checkpoints, and who reads them. No torch."""
