"""morphserve"""
