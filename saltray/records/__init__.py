"""What is kept of a run and where: its folder or bucket, and its study."""
