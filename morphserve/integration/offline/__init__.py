"""Engines that serve nobody: to measure, to check, to smoke-test."""
