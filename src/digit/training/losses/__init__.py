"""What the tokenizers are trained with: self-supervision for the encoder, and the parts of a VQGAN's loss."""
