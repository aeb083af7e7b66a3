"""What is kept of a run and where: its folder or bucket, its study; and its connection to Ray."""
