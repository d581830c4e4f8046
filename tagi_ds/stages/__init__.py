"""What each stage of a study does, between its launcher and the engine."""
