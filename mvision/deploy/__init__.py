"""Models outside PyTorch: exported to other runtimes, compared with PyTorch, quantised; and which runtime to take."""
