"""A deployed model at work on the images of a user."""
