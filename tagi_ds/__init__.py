"""Distributed training of hypernetworks that turn a task's instruction into an adapter (TAGI)."""
