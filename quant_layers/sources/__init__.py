"""Where quantized weights come from: checkpoints, scales, a profile."""
