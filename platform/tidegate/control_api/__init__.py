"""Who may change what, over both hosts. `app` has the routes, `ports` what is asked of a host."""
