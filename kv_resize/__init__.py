"""kv_resize"""
