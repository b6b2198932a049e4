"""The operators as functions."""
