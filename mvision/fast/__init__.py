"""Models made ready for fast prediction in PyTorch."""
