"""The keeper: starts the sidecar, and holds the descriptors of guests under way while it is started anew.

For hosts without systemd, whose file descriptor store it stands in for, to the byte. It lives as long as the host's
guests do and has nothing else to do, so it stays small: of the sidecar it imports only the wire between the two.
"""
