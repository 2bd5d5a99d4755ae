"""The pipeline of all components, and what is done with it."""
