"""Frozen encoders: images in, patch features out."""
