"""morphserve/replay"""
