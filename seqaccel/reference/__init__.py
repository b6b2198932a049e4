"""The operators in plain PyTorch: the specification as code, for every dtype and device."""
