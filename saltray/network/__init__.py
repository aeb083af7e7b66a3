"""What is trained: networks, losses, optimizers, and what makes them fast on CPUs. Plain PyTorch."""
