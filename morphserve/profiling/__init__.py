"""Offline: what a model's layers do to real text. Needs transformers and torch, no vLLM."""

from .smoothing import smooth_model
from .stream import Calibration, decoder_layers, norms_of, token_windows

__all__ = ["Calibration", "decoder_layers", "norms_of", "smooth_model", "token_windows"]
