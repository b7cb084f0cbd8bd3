"""The process guest: a process whose memory is the guest's, and a thread that is its vCPU."""
