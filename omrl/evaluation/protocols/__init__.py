"""Evaluation protocols, one file each: where the context of a task comes from, and which episode counts."""
