"""The task ``centers``: where is the centre of every object? A head and its metric in a package outside mvision."""
