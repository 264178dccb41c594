"""What runs like an engine, in miniature: a loop of matmuls, and a decoder on the product's own pages and graphs."""
