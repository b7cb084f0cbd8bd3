"""A real virtual machine on /dev/kvm whose every byte of memory can be predicted from its registers."""
