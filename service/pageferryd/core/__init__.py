"""The core: which page next. It does no input or output and reads no clock, so that all of it can be simulated."""
