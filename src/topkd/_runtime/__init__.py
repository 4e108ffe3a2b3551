"""Hardware and process settings: CPU, memory format, allocator, distributed processes."""
