"""Meta-training: drawing batches and taking gradient steps."""
