-- ARGV: number of queues, the queues, then pairs: id, index of its queue (from 1)
-- Returns {waiting, running, drain} per queue, then {how many wait ahead, or -1} per id, and of one that was moved also
-- the three of the queue in which it waits now.
local n = tonumber(ARGV[1])
local reply = {}

local function depth_of(queue)
  local waiting = line_of(queue).length
  local h = call('HMGET', P .. 'queue:' .. queue, 'requests', 'drain')
  return waiting, math.max(0, tonumber(h[1] or 0) - waiting), h[2] or '0'
end

for i = 1, n do reply[i] = { depth_of(ARGV[i + 1]) } end
for i = n + 2, #ARGV, 2 do
  local queue = ARGV[tonumber(ARGV[i + 1]) + 1]
  local ahead = rank(queue, ARGV[i])
  local now_in = not ahead and call('HGET', P .. 'req:' .. ARGV[i], 'queue')
  if now_in and now_in ~= queue then
    reply[#reply + 1] = { rank(now_in, ARGV[i]) or -1, depth_of(now_in) }
  else
    reply[#reply + 1] = { ahead or -1 }
  end
end
return reply
