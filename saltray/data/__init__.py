"""From the contest's folder to augmented batches: reading, splitting, streaming."""
