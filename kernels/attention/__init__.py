"""Attention on a GPU, in Triton: a folder per operator."""
