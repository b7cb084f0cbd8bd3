"""What people type: the `pageferry` command."""
