"""Sources of data, one file each, and the table of them (`registry`)."""
