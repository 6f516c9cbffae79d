-- A replica says how it is. ARGV: replica, JSON, seconds it stays listed (0: it is gone), its engine's own metrics
-- (empty: as before).
-- Listed ones are kept in `beats` by expiry; those that fell silent go with the next beat of any other.
local replica, stays = ARGV[1], tonumber(ARGV[3])
local now = server_time()
if stays > 0 then
  call('HSET', P .. 'stats', replica, ARGV[2])
  if ARGV[4] ~= '' then call('HSET', P .. 'metrics', replica, ARGV[4]) end
  call('ZADD', P .. 'beats', now + stays, replica)
else
  call('HDEL', P .. 'stats', replica)
  call('HDEL', P .. 'metrics', replica)
  call('ZREM', P .. 'beats', replica)
end
for _, silent in ipairs(call('ZRANGE', P .. 'beats', '-inf', now, 'BYSCORE', 'LIMIT', 0, 16)) do
  call('HDEL', P .. 'stats', silent)
  call('HDEL', P .. 'metrics', silent)
  call('ZREM', P .. 'beats', silent)
end
return 0
