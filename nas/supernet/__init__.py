"""One set of weights for all architectures of a space: trained once, sliced for each, audited before it ranks any."""
