"""Cloud Hypervisor: the sidecar stands in as the local peer of its live migration, on both hosts."""
