"""Who multiplies by a quantized weight here: candidates, their self-test, the choice."""
