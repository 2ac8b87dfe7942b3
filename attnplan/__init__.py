"""A compiler for attention."""
