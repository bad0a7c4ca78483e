"""Adaptation and returns on unseen tasks, embeddings, statistics."""
