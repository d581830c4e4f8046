"""The training engine: one loop over one strategy interface; it knows no data set and no model family."""
