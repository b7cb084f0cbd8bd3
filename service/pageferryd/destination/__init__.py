"""Where guests arrive: doors, installers, lanes, and the session that drives the pager."""
