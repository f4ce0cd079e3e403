"""Libraries for browsers: TVM's runtime as WebAssembly, built once, and a model linked with it."""
