"""A model as one object: configuration, network, process, data transform; and its file."""
