"""The HTTP routes, one module a group. Each `routes(services)` returns a FastAPI router."""
