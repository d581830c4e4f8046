"""Instructions encoded once: a memory-mapped cache for finetuning, whose encoder is frozen."""
