"""The instruction sets of the C++ kernels, the widest first, as csrc/cpu/isa.cpp has them."""

# Those with kernels that multiply in bfloat16.
WITH_PAIRS = ["amx_bf16", "avx512_bf16"]
ISAS = [*WITH_PAIRS, "avx512_vnni", "avx512", "avx2", "portable"]
