"""Models that are ready for prediction: exported to other runtimes, compared with PyTorch, quantised, or made fast."""
