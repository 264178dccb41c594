"""morphserve/controller"""
