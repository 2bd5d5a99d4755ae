"""Images: sources on disk or on the Hub, transforms, and batches that are a pure function of the seed and the step."""
