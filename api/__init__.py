"""The door for ASGI servers: ``uvicorn api.server:app``."""
