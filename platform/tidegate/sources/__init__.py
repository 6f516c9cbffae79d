"""Sources of models: where a checkpoint lies, how it is fetched, and what its files say of it.

`facts` and `schemes` are pure and shared with `control/`. `checkpoint` is the one reader of a folder, for the
engine too. `hub`, `buckets` and `folders` each fetch from one kind of place.
"""
