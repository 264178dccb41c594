"""What a quantized weight means: values and scales, whoever runs them. `float8` brings its kernels along."""
