"""One module per question of the issue's section 6; each takes a `Context` and returns a `Section`."""
