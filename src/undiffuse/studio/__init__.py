"""A page on this machine for looking at models; its server, its jobs, and the files of the page in ``static``."""
