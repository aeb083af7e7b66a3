"""What is trained: networks, losses, optimizers. Plain PyTorch."""
