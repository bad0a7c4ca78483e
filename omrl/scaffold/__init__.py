"""New experiments: a folder of one's own that runs at once, and the skeleton of a method."""
