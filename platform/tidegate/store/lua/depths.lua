-- ARGV: number of queues, the queues, then pairs: id, index of its queue (from 1)
-- Returns {waiting, running, drain} per queue, then how many wait ahead per id, or -1.
local n = tonumber(ARGV[1])
local reply = {}
for i = 1, n do
  local waiting = line_of(ARGV[i + 1]).length
  local h = call('HMGET', P .. 'queue:' .. ARGV[i + 1], 'requests', 'drain')
  local base = #reply
  reply[base + 1] = waiting
  reply[base + 2] = math.max(0, tonumber(h[1] or 0) - waiting)
  reply[base + 3] = h[2] or '0'
end
for i = n + 2, #ARGV, 2 do
  reply[#reply + 1] = rank(ARGV[tonumber(ARGV[i + 1]) + 1], ARGV[i]) or -1
end
return reply
