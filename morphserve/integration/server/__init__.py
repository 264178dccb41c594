"""The API-server process: metrics, the status page, reload, and the limit of its queue."""
