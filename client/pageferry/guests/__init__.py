"""The demonstration guests: small programs whose whole memory can be predicted, and so proved."""
