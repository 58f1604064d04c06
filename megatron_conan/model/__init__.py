"""The Conan decoder, its soft-mask attention, and pooling."""
