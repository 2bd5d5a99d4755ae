"""Fitting codebooks with k-means."""
