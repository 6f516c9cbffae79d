-- Does nothing, and is refused wherever a submit would be: no memory left, read-only, no replica that follows.
return 0
