"""The demonstration: two sidecars and a running guest on one machine, and the proof that it crossed whole."""
