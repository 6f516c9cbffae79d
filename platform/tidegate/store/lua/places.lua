-- ARGV: number of queues, the queues, then pairs: id, index of its queue (from 1)
-- Returns {waiting, running, drain} per queue, then how many wait ahead per id, or -1.
local n = tonumber(ARGV[1])
local reply, suspects = {}, {}
for i = 1, n do
  local queue = ARGV[i + 1]
  suspects[i] = call('ZCARD', P .. 'suspects:' .. queue)
  local waiting = call('ZCARD', P .. 'waiting:' .. queue) + suspects[i]
  local h = call('HMGET', P .. 'queue:' .. queue, 'requests', 'drain')
  local base = #reply
  reply[base + 1] = waiting
  reply[base + 2] = math.max(0, tonumber(h[1] or 0) - waiting)
  reply[base + 3] = h[2] or '0'
end
for i = n + 2, #ARGV, 2 do
  local id, index = ARGV[i], tonumber(ARGV[i + 1])
  local queue = ARGV[index + 1]
  local rank = call('ZRANK', P .. 'waiting:' .. queue, id)
  if rank then
    rank = rank + suspects[index]
  elseif suspects[index] > 0 then
    rank = call('ZRANK', P .. 'suspects:' .. queue, id)
  end
  reply[#reply + 1] = rank or -1
end
return reply
