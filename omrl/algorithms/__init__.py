"""Algorithms: one file each, with its typed configuration. They see arrays and sizes, never an environment."""
