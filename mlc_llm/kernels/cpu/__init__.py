"""CPU kernels on explicit 16-lane vectors; LLVM splits them to what the instruction set has."""
