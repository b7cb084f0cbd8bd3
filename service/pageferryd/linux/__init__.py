"""The kernel's edge: one file a subject, each turning a system interface into plain calls and FerryErrors."""
