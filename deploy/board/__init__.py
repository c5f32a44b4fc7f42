"""What a board says of itself in files: no root, no library. Every reader takes the tree's root."""
