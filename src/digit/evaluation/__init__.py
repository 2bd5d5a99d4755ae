"""Measurements: fidelity of generated images, reconstruction, stability, probes, and the toy figure."""
