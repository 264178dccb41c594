"""What a quantized weight means: values and scales, whoever runs them."""
