"""One training loop for every component, and the small task objects that say what a batch and a loss are."""
