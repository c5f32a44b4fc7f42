"""The whole road on real images, in one command."""
