"""Servers, and the client that sends to them."""
