"""The Triton kernels: the way to the GPU without a CUDA toolkit.

Importing this package imports Triton. `rnnfast/libraries.py` says whether it can, `rnnfast/ops.py` registers its ops.
"""
