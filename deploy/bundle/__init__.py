"""The bundle: a directory that holds everything a device needs, and the hash of each byte of it."""
