"""The API-server process: metrics, the status and its page, reload, and the limit of its queue."""
