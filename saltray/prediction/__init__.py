"""What a trained model makes of tiles, and the folder in which it is published."""
