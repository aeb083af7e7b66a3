"""From the contest's folder to augmented batches: reading, checking, splitting, streaming."""
