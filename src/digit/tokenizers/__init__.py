"""From images to discrete tokens: k-means codebooks over encoder features, and the VQGAN."""
