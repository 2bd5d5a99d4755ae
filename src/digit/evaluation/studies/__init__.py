"""Measurements over many settings."""
