"""From a run's checkpoint to a model folder, and from a model and an instruction to a PEFT adapter or compiled task."""
