"""Images, with or without labels: the embedded emoji-10 and any folder."""
