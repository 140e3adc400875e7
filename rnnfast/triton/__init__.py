"""The Triton kernels: the way to the GPU without a CUDA toolkit.

`availability.py` says whether they can run; importing any other module of this package imports Triton. Its ops are
registered in `rnnfast/registration.py`.
"""
