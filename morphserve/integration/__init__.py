"""morphserve/integration"""
