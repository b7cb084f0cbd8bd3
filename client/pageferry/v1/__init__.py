"""Generated from proto/pageferry/v1; do not edit."""
