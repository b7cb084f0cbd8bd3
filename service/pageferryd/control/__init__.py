"""Migrations from begin to end: the API, both ends of a handover, and what is known of each."""
