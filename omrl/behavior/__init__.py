"""Behavior policies: one SAC policy per task, the source of every dataset."""
