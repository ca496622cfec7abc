"""What can be searched: components, shipped spaces, and how YAML becomes a typed space of architectures."""
