"""pageferryd: the sidecar that runs on every host."""
