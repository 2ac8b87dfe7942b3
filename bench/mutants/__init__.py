"""How strong the coverage proof is: a syntax-tree mutator over lowering and the passes. See ``__main__.py``."""
