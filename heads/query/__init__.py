"""The query decoder, which detection and instance segmentation share, with its matching and losses."""
