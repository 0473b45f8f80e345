"""The query decoder: selection, refinement, matching and losses of classes and boxes."""
