"""Files, memory, processes and signals of the machine."""
