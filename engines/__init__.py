"""Compile and run networks. Knows arrays, not faces."""
