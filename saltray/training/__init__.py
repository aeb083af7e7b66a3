"""One trial: its loop, its checkpoints, and how Ray Train runs it."""
