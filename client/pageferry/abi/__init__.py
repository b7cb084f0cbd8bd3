"""The kernel's interfaces as numbers and structs, shared by the VMM author's library and the sidecar."""
