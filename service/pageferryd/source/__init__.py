"""Where guests leave: their memory, and the service that hands out its pages."""
