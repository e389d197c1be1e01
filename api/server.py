"""``uvicorn api.server:app --port 8000``: the server, with its settings from the environment."""

from mini_sglang.api.server import Door

app = Door()
