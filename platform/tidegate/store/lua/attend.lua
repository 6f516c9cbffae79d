-- Somebody reads these kept calls: while they run they stay. ARGV: ids
local now = server_time()
for _, id in ipairs(ARGV) do
  local linger = call('EXISTS', P .. 'open:call:' .. id) == 1 and call('HGET', P .. 'call:' .. id, 'linger')
  if linger then call('ZADD', P .. 'kept', 'XX', 'GT', now + tonumber(linger), id) end
end
return 0
