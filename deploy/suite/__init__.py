"""A bundle's parity, accuracy and speed on this device, as tests of pytest: one result each."""
