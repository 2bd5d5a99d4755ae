"""How the decoding steps run: plain, compiled, CUDA graph, native (C++)."""
