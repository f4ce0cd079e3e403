"""The runtime: loads a compiled library with TVM's runtime alone and runs steps on it."""
