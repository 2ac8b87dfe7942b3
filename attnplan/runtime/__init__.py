"""What emitted programs call: views, kernels, masks, merges, and the float64 interpreter. Needs torch."""
