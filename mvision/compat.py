"""What relies on parts of other libraries that they do not promise to keep: one entry each, with the version it was
checked with."""
