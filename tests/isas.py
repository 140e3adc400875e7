"""The instruction sets of the C++ kernels, the widest first, as csrc/cpu/isa.cpp has them."""

ISAS = ["avx512_vnni", "avx512", "avx2", "portable"]
