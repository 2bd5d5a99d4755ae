"""One transformer, and the token models built from it."""
