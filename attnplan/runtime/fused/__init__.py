"""Kernels of our own around those of attention: rows of many branches gathered, and joined, in one launch each."""
