"""Ground floor: errors, seeds, files, configuration, progress; knows nothing of reinforcement learning."""
