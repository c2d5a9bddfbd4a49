"""Read and write files and arrays on local disks and object stores; nothing here depends on the method."""
