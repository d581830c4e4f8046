"""Evaluation by generation: predictions, scores and the report of a study."""
