"""Data: tasks, examples, and the batches made of them."""
