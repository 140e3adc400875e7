"""The instruction sets of the C++ kernels, the widest first, as csrc/cpu/isa.cpp has them."""

ISAS = ["amx_bf16", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable"]
