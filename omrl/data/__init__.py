"""Transitions on disk: schema, quality levels, relabelling, buffers."""
