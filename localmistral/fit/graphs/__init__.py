"""llama.cpp's compute buffers, worked out by walking its graphs as its allocator does."""
