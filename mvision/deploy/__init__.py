"""Models outside of PyTorch: exported, checked, and run."""
