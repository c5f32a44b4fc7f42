"""What frozen features are worth: neighbours, a linear head, few labels; and whether they vary."""
