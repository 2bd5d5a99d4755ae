"""The training tasks, one file a component."""
