"""The compiler: from a chat configuration to a library of functions over tensors."""
