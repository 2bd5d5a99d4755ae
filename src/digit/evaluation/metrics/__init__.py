"""Measurements of one model or of one set of images."""
