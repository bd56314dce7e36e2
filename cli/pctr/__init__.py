"""pctr: the command that talks to supervisord-ctr, and to any daemon with containerd's API."""
