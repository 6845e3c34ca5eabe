"""The operators on the CPU, room by room as in `kernels/`.

Everything works on the foreground voxels alone, a list of one or two per cent of a patch. Results equal those of the
kernels: integers exactly, sums to the rounding of float64. All is deterministic. Lists this short are gathered with
NumPy: PyTorch would wake its threads for each. SciPy is imported when the first mask is labelled.
"""
