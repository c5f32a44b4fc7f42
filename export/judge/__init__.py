"""Whether a variant may be shipped: held against what the model itself answers."""
