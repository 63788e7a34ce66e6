"""What a rank does: from a run directory's config.yaml to final/."""
